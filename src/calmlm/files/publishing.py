"""A composition for others: its model card, and the upload to a hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi

from calmlm.config import CalmConfig, split_gguf
from calmlm.errors import ConfigError, first_line

CARD_NAME = "README.md"


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
                f"{source or 'memory'!r}: upload that model first and compose from its id."
            )


def model_card(config: CalmConfig) -> str:
    """The model card of a composition, as Markdown with the hub's metadata on top."""
    sources = [config.anchor, *config.augmenting.values()]
    named = [entry["id"] for entry in sources if entry.get("id") and not entry["id"].startswith((".", "/"))]
    ids = list(dict.fromkeys(split_gguf(name)[0] for name in named))
    head = "".join(f"- {name}\n" for name in ids)
    rows = [f"| anchor | {config.anchor.get('id') or 'given in memory'} | {config.anchor.get('revision') or ''} | |"]
    for name, entry in config.augmenting.items():
        words = entry.get("words")
        parts = [f"{i} → {j}" for i, j in entry["connections"]]
        parts += [f"words ({words.get('kind', 'map')})"] if words else []
        parts += [f"adapters (rank {entry['adapters']['rank']})"] if entry.get("adapters") else []
        pairs = ", ".join(parts)
        rows.append(f"| {name} | {entry.get('id') or 'given in memory'} | {entry.get('revision') or ''} | {pairs} |")
    return (
        "---\nlibrary_name: calmlm\npipeline_tag: text-generation\ntags:\n- calm\n- composition\n"
        + (f"base_model:\n{head}" if ids else "")
        + "---\n\n# A composition of frozen language models\n\n"
        "This folder holds the trained connections only (CALM, arXiv 2401.02412). Loading fetches the base models.\n\n"
        "| role | model | revision | connections (augmenting layer → anchor layer, 0-based) |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n\n```python\nimport calmlm\n\nmodel = calmlm.CalmForCausalLM.from_pretrained(folder)\n```\n"
    )


class Published:
    """A composition that can be uploaded."""

    config: CalmConfig
    save_pretrained: Callable[..., None]

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
    ) -> str:
        """Upload the composition's tensors, configuration and model card to a repository, made if needed.

        Args:
            repo_id: name of the repository, with its owner.
            commit_message: of the upload.
            commit_description: what the commit or pull request says besides.
            private: whether a new repository is private; the hub's default where None.
            token: the hub's access token; the stored one by default.
            revision: branch to upload to.
            create_pr: whether to open a pull request instead.

        Returns:
            the address of the commit.

        Raises:
            ConfigError: when a base model has no hub id, so that nobody else could load the composition, or the hub
                refuses or cannot be reached.
        """
        check_published(self.config)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
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
            except (OSError, ValueError) as error:  # of huggingface_hub: no network, no right to it, no such name
                raise ConfigError(
                    f"The hub must be reached and take the repository {repo_id!r}, but it did not "
                    f"({first_line(error)}): check the name, the token and the network."
                ) from error
