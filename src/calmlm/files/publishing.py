"""A composition for others: the upload to a hub."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import EvalResultEntry, HfApi, ModelCard
from torch import Tensor

from calmlm.bases.reaching import UNREACHED
from calmlm.config import CalmConfig
from calmlm.errors import ConfigError, first_line
from calmlm.files.card import CARD_NAME, Learned, model_card
from calmlm.files.leaderboards import RESULTS, check_results, write_results
from calmlm.files.paths import lies_in
from calmlm.files.storage import portable_config, write_text

BESIDE = (
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
    "added_tokens.json",
)
"""What lies beside a composition and belongs to its tokenizer."""


def check_published(config: CalmConfig) -> None:
    """Raise unless every base model has a hub id.

    Raises:
        ConfigError: naming the first that has none.
    """
    for role, entry in (("anchor", config.anchor), *config.augmenting.items()):
        source = entry.get("id") or ""
        if not source or source.startswith((".", "/")) or Path(source).is_dir():
            raise ConfigError(
                f"The bases of a composition must have hub ids before it is uploaded, but {role!r} comes from "
                f"{source or 'memory'!r}: upload that model first and compose from its id, or upload what calmlm "
                f"export writes."
            )


class Published:
    """A composition that can be uploaded."""

    config: CalmConfig
    save_pretrained: Callable[..., None]
    model_tags: Sequence[str] | None
    _place: str | None

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = None,
        tags: Sequence[str] | None = None,
        datasets: Sequence[str] = (),
        results: Sequence[EvalResultEntry] = (),
        state_dict: dict[str, Tensor] | None = None,
    ) -> str:
        """Upload the composition's tensors, configuration and model card to a repository, made if needed.

        A composition that is as it was loaded from a folder keeps that folder's tokenizer, card and results.

        Args:
            repo_id: name of the repository, with its owner.
            commit_message: of the upload.
            commit_description: what the commit or pull request says besides.
            private: whether a new repository is private; the hub's default where None.
            token: the hub's access token; the stored one by default.
            revision: branch to upload to.
            create_pr: whether to open a pull request instead.
            max_shard_size: without effect: a composition is one file.
            tags: further ones for the card, beside those of ``add_model_tags``.
            datasets: ids of the data sets that it was trained on, for a card that is written now.
            results: of benchmarks, for the card and for the hub's leaderboards (``.eval_results/*.yaml``).
            state_dict: tensors to upload instead of the model's own, as of ``save_pretrained``.

        Returns:
            the address of the commit.

        Raises:
            ConfigError: when a base model has no hub id, so that nobody else could load the composition, or the hub
                refuses or cannot be reached, or a result is none that the hub reads.
        """
        check_published(self.config)
        check_results(results)
        with tempfile.TemporaryDirectory() as folder:
            self._keep(Path(self._place) if self._place else None, Path(folder))
            if datasets and not (Path(folder) / CARD_NAME).exists():
                config = portable_config(self.config, Path(folder))
                write_text(Path(folder) / CARD_NAME, model_card(config, Learned(datasets)))
            self.save_pretrained(folder, state_dict=state_dict)
            _tag(Path(folder) / CARD_NAME, [*(self.model_tags or ()), *(tags or ())])
            if results:
                write_results(folder, results)
            api = HfApi(token=token)
            try:
                repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                return api.upload_folder(
                    folder_path=folder,
                    repo_id=repo_id,
                    commit_message=commit_message or "Upload a composition",
                    commit_description=commit_description,
                    revision=revision,
                    create_pr=create_pr,
                )
            except UNREACHED as error:
                raise ConfigError(
                    f"The hub must be reached and take the repository {repo_id!r}, but it did not "
                    f"({first_line(error)}): check the name, the token and the network."
                ) from error

    @staticmethod
    def _keep(place: Path | None, folder: Path) -> None:
        """Copy what lies beside a saved composition, where it was loaded from a folder and has not changed since."""
        if place is None or not place.is_dir():
            return
        for pattern in (CARD_NAME, *BESIDE):
            for path in place.glob(pattern):
                if path.is_file() and lies_in(path, place):
                    shutil.copyfile(path, folder / path.name)
        for path in (place / RESULTS).glob("*.yaml"):
            if path.is_file() and lies_in(path, place):
                (folder / RESULTS).mkdir(exist_ok=True)
                shutil.copyfile(path, folder / RESULTS / path.name)


def _tag(path: Path, tags: Sequence[str]) -> None:
    """Give a card further tags, each once."""
    card = ModelCard.load(path)
    if set(tags) - set(card.data.tags or ()):
        card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), *tags]))
        card.save(path)
