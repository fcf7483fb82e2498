"""Write the committed results into the pages that quote them, each between its two markers.

.venv/bin/python scripts/tables.py            # rewrite the pages
.venv/bin/python scripts/tables.py --check    # status 1 if one of them is behind the results
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calmlm.comparison.page import markdown
from calmlm.experiments.kv_arithmetic import report as kv
from calmlm.experiments.kv_arithmetic.measures import COLUMNS
from calmlm.experiments.several.run import markdown as several_at_once
from calmlm.experiments.statistics import cells_of, table_of

ROOT = Path(__file__).parent.parent
KV_PAGE = "experiments/kv_arithmetic/results/small.md"
PLOTS = (ROOT / "experiments" / "compare" / "results", ROOT / "docs" / "images" / "results")
"""Where the pictures of a page lie, and where a site finds them."""


SYSTEMS = {"m_A": "m_A", "m_B": "m_B", "composed": "**composed**", "cascade": "cascade", "lora": "LoRA"}
SKILLS = {
    "kv_arithmetic/key_value": "keys (m_A knows them)",
    "kv_arithmetic/numeric": "sums (m_B knows them)",
    "kv_arithmetic/keys_arithmetic": "sums of keys (neither does)",
}


def matches(rows: dict[tuple[str, str], Any], method: str) -> list[str]:
    """Exact match of a method on each skill."""
    return [format(rows[method, task]["mean"], ".1f") for task in SKILLS]


def systems(result: dict[str, Any]) -> str:
    """Five systems on three skills: a first look at the comparison."""
    rows = {(row["method"], row["task"]): row for row in result["rows"]}
    lines = [f"| | {' | '.join(SKILLS.values())} |", "|---" * (1 + len(SKILLS)) + "|"]
    lines += [f"| {title} | {' | '.join(matches(rows, method))} |" for method, title in SYSTEMS.items()]
    seeds = rows["composed", "kv_arithmetic/keys_arithmetic"]["seeds"]
    lines += [
        "",
        f"Exact match in per cent, mean over {seeds} seeds. LoRA trains about as many parameters as the composition, "
        "on the same data. The cascade is told which words are keys. [All systems, with intervals](results.md).",
    ]
    return "\n".join(lines)


CHOICES = {
    "composed": "**CALM**",
    "lora": "LoRA on D_C",
    "continued_pretraining": "m_B trained on m_A's corpus",
    "task_arithmetic": "merging: task arithmetic",
    "ties": "merging: TIES",
    "moe": "mixture of experts",
    "router": "router",
    "text_tool": "m_A as a tool, in text",
    "cascade": "cascade, which is told the rule",
}


def choices(result: dict[str, Any]) -> str:
    """The systems that one chooses between: three skills, what is forgotten, and what decoding costs."""
    rows = {(row["method"], row["task"]): row for row in result["rows"]}
    lines = [
        f"| | {' | '.join(SKILLS.values())} | m_B's skills, after minus before | numbers trained | decoding, m_B = 1 |",
        "|---" * (4 + len(SKILLS)) + "|",
    ]
    for method, title in CHOICES.items():
        row = rows[method, "kv_arithmetic/keys_arithmetic"]
        shown = matches(rows, method)
        shown += [f"{row['retained_delta']:+.1f}", f"{row['trainable_parameters']:,}"]
        lines.append(f"| {title} | {' | '.join(shown)} | {row['decode_time_x_anchor']:.2f} |")
    seeds = min(rows[method, "kv_arithmetic/keys_arithmetic"]["seeds"] for method in CHOICES)
    lines += [
        "",
        f"Exact match in per cent, mean over {seeds} seeds. Merging and the mixture take a twin of m_B that was "
        "trained on m_A's corpus. [All systems, with intervals](results.md).",
    ]
    return "\n".join(lines)


TRANSLATORS = {
    "m_B": "m_B",
    "m_A_examples": "m_A, which reads 5 examples",
    "ensemble_examples": "both models' probabilities at one weight",
    "lora": "LoRA on m_B, as many parameters",
    "graft_adapters_map_long": "**composed**",
    "graft_adapters_map_random": "composed with a random m_A",
}


def translators(result: dict[str, Any]) -> str:
    """Six systems of two real models: the README's first look at what a composition is good for."""
    rows = result["rows"]
    lines = [
        "| | bits per byte, varieties in D_C | other varieties | when m_A reads another sentence | English |",
        "|---|---|---|---|---|",
    ]
    for name, title in TRANSLATORS.items():
        row = rows[name]
        swapped = f"{row['swapped']['mean']:.2f}" if "swapped" in row else "-"
        lines.append(
            f"| {title} | {row['inside']['mean']:.2f} | {row['outside']['mean']:.2f} | {swapped} | "
            f"{row['english']:.2f} |"
        )
    counts = [rows[name]["seeds"] for name in TRANSLATORS]
    least, most = min(counts), max(counts)
    seeds = f"{least} to {most} seeds" if least < most else "One seed" if most == 1 else f"{most} seeds"
    return "\n".join(
        [
            *lines,
            "",
            "Two real models translate into English from varieties of Arabic, Persian and Bihari: "
            f"SmolLM2-135M-Instruct (m_B) and Gemma 3 270M (m_A). {seeds}; "
            "less is better; English: of plain English, m_B = 1. `scripts/models` and `calmlm demo translation` show "
            "them. [All rows, with intervals](experiments/real/results/translation.md). "
            "[Models made from nothing](docs/results.md).",
        ]
    )


RECIPES = {
    "m_B": "m_B alone",
    "m_A_examples": "m_A alone, with five examples",
    "lora": "LoRA on m_B",
    "connections": "cross-attention at every fourth layer, from noise",
    "connections_random": "the same with a *random* m_A",
    "words_map": "`words: map` alone",
    "words_pointer_examples": "`words: pointer` alone, five examples for m_A",
    "graft_adapters": "graft and adapters",
    "graft_adapters_map": "graft, adapters and `words: map`",
    "graft_adapters_map_long": "the same, three times as long",
    "graft_adapters_map_random": "the same with a *random* m_A, 60 steps",
    "graft_adapters_pointer_examples": "graft, adapters, `words: pointer`, five examples",
    "graft_adapters_pointer_examples_long": "the same, three times as long",
}


def recipes(result: dict[str, Any]) -> str:
    """What each part of a composition of two real models adds."""
    lines = ["| | trained numbers | bits per byte | gain | seeds |", "|---|---:|---:|---:|---:|"]
    for name, title in RECIPES.items():
        row = result["rows"][name]
        trained = row.get("parameters", 0)
        shown = f"{trained / 1e6:.1f}M" if trained > 1e5 else f"{trained:,.0f}"
        gain = f"{row['gain']['mean']:.3f}" if "gain" in row else ""
        lines.append(f"| {title} | {shown} | {row['inside']['mean']:.3f} | {gain} | {row['seeds']} |")
    return "\n".join(lines)


VARIETIES = {
    "m_B_examples": "m_B, 5 examples",
    "m_A_examples": "m_A, 5 examples",
    "m_A_examples_guided": "m_A, 5 examples, guidance 1.5",
    "lora": "LoRA",
    "lora_guided": "LoRA, guidance 1.5",
    "lora_more": "LoRA, 2,460 pairs",
    "lora_more_guided": "LoRA, 2,460 pairs, guidance 1.5",
    "random": "composed with a random m_A",
    "composed": "**composed**",
    "composed_held": "the same, held to m_B on plain English",
    "composed_shown": "composed, m_A reads examples in the variety that is asked",
    "composed_shown_guided": "that, guidance 1.5",
    "composed_more": "composed, 2,460 pairs",
    "composed_more_shown": "that, m_A reads examples in the variety that is asked",
    "composed_more_shown_guided": "that, guidance 1.5",
}


def varieties(result: dict[str, Any]) -> str:
    """Translation from 40 varieties: the rows that matter most."""
    found = result["by_variety"]
    methods, known, count = found["methods"], len(found["known"]), len(found["varieties"])
    lines = [
        f"| | seeds | bits per byte | chrF, all {count} | chrF, the {known} that m_A knows better "
        "| above LoRA on the same pairs there | above m_B | above both |",
        "|---" + "|---:" * 7 + "|",
    ]
    for name, title in VARIETIES.items():
        if name not in methods:
            continue
        row = methods[name]
        above = [str(row["above"][rival]) for rival in ("m_B", "both")]
        lora = f"{row['above_lora_known']['mean']:+.1f}" if "above_lora_known" in row else "-"
        figures = [f"{row['bits_all']['mean']:.3f}", *(f"{row[key]['mean']:.1f}" for key in ("chrf_all", "chrf_known"))]
        lines.append(f"| {title} | {row['seeds']} | {' | '.join([*figures, lora, *above])} |")
    return "\n".join(lines)


def choosing(result: dict[str, Any]) -> str:
    """The same, as a page of the site: links that lead out of docs/ are named."""
    text = re.sub(r"\[([^\]]*)\]\((experiments/[^)]*)\)", r"\1 (`\2`)", translators(result))
    return text.replace("](docs/", "](")


def key_values(result: dict[str, Any]) -> str:
    """The table of key-value arithmetic alone, and where the rest is."""
    rows = table_of(cells_of(result["rows"]), kv.METHODS, COLUMNS, kv.PUBLISHED)
    caption = (
        f"Exact match in per cent, mean over {len(result['seeds'])} seeds and its 95 % interval; in brackets what the "
        f"slides publish for far larger models. What was trained on what, and how long it took (`{KV_PAGE}`)."
    )
    return "\n".join([*rows, "", caption])


def measured(result: dict[str, Any]) -> str:
    """On what a benchmark ran, and how."""
    machine = result["machine"]
    return f"on {machine['processor']} ({machine['cores']} cores, {machine['device']}): `{result['command']}`"


def overheads(result: dict[str, Any]) -> str:
    """What an alignment costs, as the benchmark measured it."""
    lines = [
        "| alignment | | batch | tokens | time, relative to shared token ids | spread (quartiles) |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{case['alignment']}` | {case['what']} | {case['batch']} | {case['length']} | "
        f"{case['time_x_shared']:.3f} | {case['quartile_distance']:.3f} |"
        for case in result["cases"]
    ]
    lines += [
        "",
        f"Median ratios over {result['rounds']} rounds in one process, both compositions in turn and reading equally "
        f"many tokens, {measured(result)}. An augmenting tokenizer that needs more tokens for the same text "
        "costs what its model needs for them.",
    ]
    return "\n".join(lines)


def listening(result: dict[str, Any]) -> str:
    """What real augmenting models understand with each alignment."""
    lines = [
        "| `alignment` | the augmenting model | source | alone | inside |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{case['alignment']}` | {case['augmenting']} | {case['variety']} | {case['alone']:.3f} | "
        f"{case['inside']:.3f} |"
        for case in result["cases"]
    ]
    lines += [
        "",
        f"Bits per byte of {result['rows']} English sentences behind their translation, by the augmenting model itself "
        f"(alone) and from what it reads in the composition (inside): `{result['command']}`.",
    ]
    return "\n".join(lines)


def real(result: dict[str, Any]) -> str:
    """What a composition of real models costs, as the benchmark measured it."""
    lines = [
        "| | completion | `alignment` | seconds | relative to both models alone | relative to `transcode` | "
        "m_A's tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        read = case.get("augmenting_tokens_per_step", case.get("augmenting_tokens", ""))
        read = f"{read} per step" if "augmenting_tokens_per_step" in case else read
        lines.append(
            f"| {case['what']} | {case['completion']} | `{case['alignment']}` | {case['seconds']:.2f} | "
            f"{case['time_x_floor']:.2f} | {case['time_x_transcode']:.2f} | {read} |"
        )
    lines += [
        "",
        f"{result['augmenting']} inside {result['anchor']} in {result['dtype']}. A training step reads "
        f"{result['batch']} texts; decoding writes the first tokens of an answer one by one. Medians of "
        f"{result['rounds']} rounds in one process, all in turn, {measured(result)}. Both models alone: "
        "their forward passes, m_A without its head.",
    ]
    return "\n".join(lines)


KINDS = {
    "own": "four cross-attentions, untrained",
    "map": "graft, adapters and map of words, trained",
    "pointer": "graft, adapters and pointer, trained",
}
MODES = {"eager": "eager", "merged": "adapters merged", "compiled": "adapters merged, compiled"}


def real_decoding(result: dict[str, Any]) -> str:
    """What a token costs that a composition of real models writes, as the benchmark measured it."""
    lines = ["| | completion | mode | relative to both models alone |", "|---|---|---|---|"]
    for case in result["cases"]:
        title, mode = KINDS[case["alignment"]], MODES[case["mode"]]
        lines.append(f"| {title} | {case['completion']} | {mode} | {case['time_x_floor']:.2f} |")
    lines += [
        "",
        f"{result['augmenting']} inside {result['anchor']} in {result['dtype']}, one text, token by token. Medians of "
        f"{result['rounds']} rounds in one process, all in turn, {measured(result)}. Both models alone decode the same "
        "tokens, m_A without its head.",
    ]
    return "\n".join(lines)


def training(result: dict[str, Any]) -> str:
    """What a training step costs, as the benchmark measured it."""
    lines = [
        "| models | method | connections | cache | kept | compiled | time, of both forward passes | "
        "of full fine-tuning | operations, of the least | saved, MiB | peak, MiB |",
        "|---|---|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for case in result["cases"]:
        shown = [case[name] or "" for name in ("models", "method", "placement", "cache")]
        kept = (case["checkpointing"] or "all") if case["method"] == "calmlm" else ""
        limit = f"{case['flops_x_limit']:.3f}" if case["flops_x_limit"] else ""
        saved, peak = (f"{case[name]:.0f}" if case[name] else "" for name in ("saved_mib", "peak_mib"))
        compiled = "yes" if case["compiled"] else ""
        lines.append(
            f"| {' | '.join(shown)} | {kept} | {compiled} | {case['time_x_floor']:.2f} | "
            f"{case['time_x_full_fine_tuning']:.2f} | {limit} | {saved} | {peak} |"
        )
    peaks = "; ".join(
        f"{case['loss']}, {case['length']} tokens: {case['peak_mib']:,.0f} MiB" for case in result["memory"]
    )
    lines += [
        "",
        f"Medians of {result['rounds']} rounds in one process, all in turn, {measured(result)}. Tiny: random Gemmas, 8 "
        "texts of 128 tokens in float32, the second half learned. Real: Gemma 3 270M in SmolLM2-135M-Instruct, 16 "
        "texts in bfloat16. *The least*: what the placement allows. *Saved*: what is in memory behind the forward "
        "pass, weights left out. *Compiled*: by `torch.compile`, its first step not counted. All are compared with "
        "full fine-tuning that is not compiled.",
        "",
        f"Peak of a step over a vocabulary of {result['memory'][0]['vocabulary']:,}, 8 rows with 16 labels each: "
        f"{peaks}. *full* are the logits of all positions, *trainer* and *sft* the losses of both backends.",
    ]
    return "\n".join(lines)


TRAINED = {
    "plain": "the experiment's connections, nothing saved",
    "saving": "the same, everything switched on",
    "even": "evenly spaced connections, nothing saved",
    "top": "top connections, nothing saved",
}


def quality(result: dict[str, Any]) -> str:
    """What savings cost in quality, as the benchmark measured it."""
    cells = cells_of(result["keys"])
    counts = {TRAINED[row["method"]]: row["seeds"] for row in result["keys"]}
    several = ", ".join(f"{title}: {count}" for title, count in counts.items())
    seeds = several if len(set(counts.values())) > 1 else str(max(counts.values()))
    lines = [
        *table_of(cells, TRAINED, COLUMNS),
        "",
        "Exact match in per cent, mean over seeds and its 95 % interval; [what is asked](key-value.md). "
        f"Seeds: {seeds}.",
    ]
    found = result["real"]
    if found:
        plain, saving, more = (
            "{mean:.3f} ({low:.3f} to {high:.3f})".format(**found[name])
            for name in ("plain", "saving", "saving_minus_plain")
        )
        lines += [
            "",
            f"The recipe of `configs/real/train.yaml`, bits per byte of {found['sentences']!s} sentences "
            f"that it has not seen: {plain}, with everything switched on {saving}; difference {more}.",
        ]
    return "\n".join([*lines, "", f"Measured {measured(result)}."])


SETTINGS = {
    "random": "random weights",
    "known": "trained, what m_A knows",
    "combined": "trained, what takes both",
}


def decoding(result: dict[str, Any]) -> str:
    """What generation costs, as the benchmark measured it."""
    lines = [
        "| models | batch | prompt | mode | drafts | time, relative to both models alone | speed, relative to the "
        "anchor alone | drafts accepted | tokens per pass of the anchor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        drafted = case["drafting"]
        lines.append(
            f"| {SETTINGS[case['models']]} | {case['batch']} | {case['prompt']} | {case['mode']} | "
            f"{'yes' if drafted else 'no'} | {case['time_x_floor']:.2f} | {case['speed_x_anchor']:.2f} | "
            + (f"{case['acceptance']:.0%} | {case['tokens_per_anchor_pass']:.1f} |" if drafted else "| |")
        )
    for case in result["other_systems"]:
        lines.append(
            f"| {case['system']}, random weights | {case['batch']} | {case['prompt']} | eager | no | "
            f"{case['time_x_floor']:.2f} | {case['speed_x_anchor']:.2f} | | |"
        )
    plain = next(case for case in result["cases"] if case["models"] == "random" and not case["drafting"])
    threads = "one thread" if result["threads"] == 1 else f"{result['threads']} threads"
    prefill = ", ".join(
        f"{case['time_x_floor']:.2f} ({case['batch']} x {case['prompt']} tokens; peak memory "
        f"{case['peak_x_floor']:.2f})"
        for case in result["prefill"]
    )
    lines += [
        "",
        f"Reading a prompt, relative to both models alone: {prefill}.",
        "",
        f"Operations per token: {plain['flops_x_floor']:.3f} times those of both models, "
        f"{plain['flops_x_floor_without_connections']:.3f} without what the connections themselves compute (less than "
        f"one: the augmenting model's output embeddings are not run). Bytes per token in the cache: "
        f"{plain['cache_bytes_per_token']:,} against {plain['cache_bytes_per_token_of_both_models']:,} of both models "
        f"alone; the connections keep keys and values of the anchor's width.",
        "",
        f"Random weights: a Gemma-style anchor (512 wide, 12 layers) with an augmenting model (256, 6) and three "
        f"connections. Trained: an anchor of 16 layers that calculates and an augmenting model of 4 that knows keys. "
        f"Medians of {result['rounds']} rounds in one process, all in turn, {threads}, "
        f"{measured(result)}. "
        + (
            "All tokens were those of decoding without a cache."
            if all(case["tokens_match"] for case in result["cases"])
            else "**Not all tokens were those of decoding without a cache.**"
        ),
    ]
    return "\n".join(lines)


def comparison(result: dict[str, Any]) -> str:
    """The whole report of the comparison."""
    return markdown(result, plots="images/results/")


def several(result: dict[str, Any]) -> str:
    """The report of several augmenting models, without its title."""
    return several_at_once(result).partition("\n")[2]


TABLES: list[tuple[str, str, str, Callable[[dict[str, Any]], str]]] = [
    ("README.md", "translators", "experiments/real/results/translation.json", translators),
    ("docs/choosing.md", "choices", "experiments/compare/results/small.json", choices),
    ("docs/choosing.md", "translators", "experiments/real/results/translation.json", choosing),
    ("docs/real.md", "several", "experiments/several/results/several.json", several),
    ("docs/translation.md", "varieties", "experiments/translation/results/translation.json", varieties),
    ("docs/comparison.md", "systems", "experiments/compare/results/small.json", systems),
    ("docs/key-value.md", "table", "experiments/kv_arithmetic/results/small.json", key_values),
    ("docs/any-two-models.md", "overhead", "benchmarks/results/alignment_cpu.json", overheads),
    ("docs/any-two-models.md", "real", "benchmarks/results/real_cpu.json", real),
    ("docs/real-models.md", "recipes", "experiments/real/results/translation.json", recipes),
    ("docs/real-models.md", "real-decoding", "benchmarks/results/real_decoding_cpu.json", real_decoding),
    ("docs/any-two-models.md", "listening", "benchmarks/results/listening.json", listening),
    ("docs/training.md", "steps", "benchmarks/results/train_cpu.json", training),
    ("docs/training.md", "quality", "benchmarks/results/quality.json", quality),
    ("docs/generation.md", "decoding", "benchmarks/results/decode_cpu.json", decoding),
    ("docs/results.md", "report", "experiments/compare/results/small.json", comparison),
]
"""Page, name of its markers, results, and what writes them."""


def with_table(text: str, name: str, table: str) -> str:
    """The text with `table` between the markers of this name."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n\n{table.strip()}\n\n{end}{after}"


def main(arguments: list[str]) -> int:
    behind = 0
    for page, name, results, write in TABLES:
        source, target = ROOT / results, ROOT / page
        if not source.exists():
            print(
                f"error: expected results at {source}, but there are none; run what makes them first.", file=sys.stderr
            )
            return 2
        old = target.read_text(encoding="utf-8")
        new = with_table(old, name, write(json.loads(source.read_text(encoding="utf-8"))))
        behind += new != old
        if arguments != ["--check"]:
            target.write_text(new, encoding="utf-8")
    for plot in sorted(PLOTS[0].glob("*.png")):
        copy = PLOTS[1] / plot.name
        behind += not copy.exists() or copy.read_bytes() != plot.read_bytes()
        if arguments != ["--check"]:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(plot.read_bytes())
    return int(behind > 0) if arguments == ["--check"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
