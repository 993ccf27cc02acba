"""Export of a finished run: a folder with the adapter and a model card that gives an interval with every number."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Missing, UserError
from ..evaluation import record
from ..evaluation.record import Number, Record
from ..evaluation.seed_library import seed_note
from ..evaluation.transfer import transfer_text
from ..evaluation.verification import Verified, read_statements, verification_line
from ..files import copy_file, write_atomically
from ..model_spec import ModelSpec, find_model_spec
from ..models.open import usage

ADAPTER = "pytorch_lora_weights.safetensors"
RESULTS = ".eval_results/gpobench.yaml"
# The hub's names of licences; any other is "other", with its name and a link to the base model.
LICENCES = {
    "Apache-2.0": "apache-2.0",
    "MIT": "mit",
    "CreativeML OpenRAIL-M": "creativeml-openrail-m",
    "CreativeML Open RAIL++-M": "openrail++",
}


@dataclass(frozen=True)
class Exported:
    """The folder and files that were written, and the warnings on the card."""

    folder: Path
    files: tuple[str, ...]
    warnings: tuple[str, ...]


def export(run: Path, to: Path, *, repo: str | None = None, benchmark: str | None = None) -> Exported:
    """Write the adapter, README.md, config.toml and sample images of a run into a folder.

    Args:
        run: the run directory.
        to: the folder to write.
        repo: the owner/name it will have on the hub, for the card.
        benchmark: a data set that is registered on the hub as a benchmark and whose leaderboard should show these numbers. They
            are then also written to .eval_results/gpobench.yaml, in the format of https://huggingface.co/docs/hub/eval-results,
            which the hub refuses for other data sets. Without it only the card's model-index holds them.

    Returns:
        The files written, and the warnings on the card.

    Raises:
        UserError: where the run is not finished, the adapter is missing or damaged, or the folder cannot be written.
    """
    if not (run / "record.json").is_file():
        raise UserError(f"no finished run in {run}")
    run_record = record.read(run / "record.json")
    if run_record.kind != "run":
        raise UserError(f"{run} is no run but an {run_record.kind}: it has nothing to export")
    if to.resolve() == run.resolve():
        raise UserError(f"{to} is the run directory, whose own README.md would be overwritten: give another folder")
    for name in (repo, benchmark):
        if name is not None:
            _check_name(name)
    model_spec = find_model_spec(run_record.model)
    searched = run_record.stop.startswith("search:") or "inference" in run_record.nfe_by_role
    adapter = run / "adapter" / ADAPTER
    if not searched:
        _refuse_link(run, adapter)
        _check_adapter(adapter)
    record.verified(run, run_record, "scores.parquet")  # the numbers of the card are estimates of these scores
    warnings = tuple(_warnings(run_record, searched))
    sources = {ADAPTER: adapter, "config.toml": run / "config.toml", "samples.png": run / "samples" / "pairs.png"}
    files = {name: path for name, path in sources.items() if path.is_file() and not (searched and name == ADAPTER)}
    for path in files.values():
        _refuse_link(run, path)
        record.verified(run, run_record, path.relative_to(run).as_posix())
    card = _ModelCard(run_record, model_spec, repo, warnings, searched, "samples.png" in files, read_statements(run))
    texts = {"README.md": _readme(card)}
    if benchmark is not None:
        texts[RESULTS] = _results(run_record, benchmark)
    try:
        (to / RESULTS if benchmark else to / "README.md").parent.mkdir(parents=True, exist_ok=True)
        for name, path in files.items():
            write_atomically(to / name, lambda p, path=path: copy_file(path, p))
        for name, text in texts.items():
            write_atomically(to / name, lambda p, text=text: p.write_text(text, "utf-8"))
    except OSError as error:
        raise UserError(f"cannot write {to}: {error.strerror}") from None
    return Exported(to, (*files, *texts), warnings)


def push(exported: Exported, repo: str, *, private: bool = False) -> str:
    """Upload the exported files, and no others, to the model hub; returns the address. Raises UserError where that fails."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            folder_path=exported.folder,
            repo_id=repo,
            allow_patterns=list(exported.files),
            commit_message="Adapter and model card, written by gpobench",
        )
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot upload to {repo}: {reason} (a token comes from `hf auth login` or HF_TOKEN)") from None
    return str(commit)


def _refuse_link(run: Path, path: Path) -> None:
    """Raise UserError where a run's file is a link or lies behind one: it would publish a file that is not of this run."""
    for part in (path, *path.relative_to(run).parents):
        if part != Path() and (run / part).is_symlink():
            raise UserError(f"{run / part} is a link, and an export holds files of the run only: put a copy there")


def _check_name(name: str) -> None:
    """Raise UserError unless a name is an owner/name as the hub allows it."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
        if "/" not in name:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise UserError(f"{name!r} is no owner/name of the hub: {str(error).splitlines()[0]}") from None


def _check_adapter(path: Path) -> None:
    """Raise UserError where the adapter is missing or truncated; safetensors compares its length with its header."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"no adapter at {path}")
    try:
        with safe_open(path, "numpy") as file:
            if not file.keys():
                raise UserError(f"the adapter {path} holds nothing")
    except (SafetensorError, OSError) as error:
        raise UserError(f"the adapter {path} is damaged: {str(error).splitlines()[0]}") from None


def _warnings(r: Record, searched: bool) -> list[str]:
    """Return what a reader of the card must know before the numbers."""
    revision = str(r.provenance.get("revision", ""))
    share = f"{100 * record.INVALID:g} %"
    warnings = {
        f"This run ended by a fault, so it is no result and in no ranking: {r.fault}.": bool(r.fault),
        "The training scorer rose while the held-out ones followed too little, or a quality column fell: the gain may be the scorer's "
        f"error rather than better images.{_reasons(r)}": r.flags.hack,
        f"More than {share} of the images of a scorer could not be scored: these numbers are not valid.": r.flags.invalid,
        "This run searched at inference and trained nothing: there is no adapter, and the training scorer chose the "
        "images, so only the held-out scorers say what was gained.": searched,
        "The code that made this run had changes that are in no commit.": not revision or revision.endswith("-dirty"),
    }
    return [text for text, applies in warnings.items() if applies]


def _split(r: Record) -> str:
    """Return the split that the run was evaluated on."""
    return str(r.config.get("evaluation", {}).get("split", "test"))


def _images(r: Record) -> int | None:
    """Return the number of images per prompt in the evaluation."""
    evaluation = r.config.get("evaluation", {})
    return evaluation.get("validation_images" if _split(r) == "validation" else "test_images")


def _role(r: Record, key: str) -> str:
    """Return the role of the scorer behind a key; diversity and drift have no scorer."""
    scorer = r.scorers.get(key.partition("/")[0])
    return scorer.role if scorer else key.partition("-")[0]


def _id(r: Record, key: str) -> str:
    """Return the id of the scorer or embedder behind a key."""
    name = key.partition("/")[0]
    return r.scorers[name].id if name in r.scorers else r.embedders.get(name.partition("-")[2], "")


def _reasons(r: Record) -> str:
    return f" By the numbers: {'; '.join(r.flags.reasons)}." if r.flags.reasons else ""


def _number(n: Number) -> dict[str, Any]:
    """Return a number with its interval as plain values."""
    return {"mean": n.mean, "ci95": None if None in n.ci else list(n.ci), "prompts": n.n}


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    """Return nested values without None, which the hub's library drops on writing."""
    inner = {key: _without_none(value) if isinstance(value, dict) else value for key, value in table.items()}  # type: ignore[arg-type]
    return {key: value for key, value in inner.items() if value is not None}


def _eval_results(r: Record) -> list[Any]:
    """Return one result for each scored metric, with its interval."""
    from huggingface_hub import EvalResult

    split = _split(r)
    return [
        EvalResult(
            task_type="text-to-image",
            task_name="Text-to-Image",
            dataset_type=f"gpobench-{r.task}",  # prompts that come with the package, no data set of the hub
            dataset_name=f"{r.task}, task version {r.task_version}, of gpobench",
            dataset_split=split,
            dataset_revision=r.prompts.get(split),  # sha256 of the prompts in order
            dataset_args=_without_none({"images_a_prompt": _images(r)}),
            metric_type=key,
            metric_name=f"{key} ({_role(r, key)})",
            metric_config=_id(r, key),
            metric_value=n.mean,
            metric_args=_without_none(
                {
                    **_number(n),
                    "before": _number(r.before[key]) if key in r.before else None,
                    "difference": {**_number(r.delta[key]), "p": r.delta[key].p} if key in r.delta else None,
                }
            ),
            verified=False,
        )
        for key, n in r.after.items()
        if n.mean is not None
    ]


@dataclass(frozen=True)
class _ModelCard:
    """What a model card is written from."""

    record: Record
    model_spec: ModelSpec
    repo: str | None
    warnings: tuple[str, ...]
    searched: bool  # the run searched at inference and has no adapter
    has_samples: bool
    verified: Verified


def _readme(card: _ModelCard) -> str:
    """Return the model card, its front matter as the hub reads it; it is read back and compared."""
    from huggingface_hub import ModelCard, ModelCardData

    r, model_spec, searched = card.record, card.model_spec, card.searched
    results = _eval_results(r)
    licence = LICENCES.get(model_spec.licence)
    hub = model_spec.source if model_spec.revision else None
    data = ModelCardData(
        base_model=hub,  # a folder has no name on the hub
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=licence or "other",
        license_name=None if licence else model_spec.licence,
        license_link=f"https://huggingface.co/{hub}" if hub and not licence else None,
        tags=[
            "gpobench",
            "text-to-image",
            "diffusers",
            *([] if searched else ["lora"]),
            r.method.replace(":", "-"),
            r.task,
        ],
        model_name=f"{r.method} on {r.task}, {r.model}",
        eval_results=results or None,
    )
    text = f"---\n{data.to_yaml()}\n---\n\n{_body(card)}"
    back = ModelCard(text).data.to_dict()
    if ModelCardData(**back).eval_results != (results or None) or back["library_name"] != "diffusers":
        raise RuntimeError("the model card does not read back as it was written")
    return text


def _body(card: _ModelCard) -> str:
    """Return the text of the model card: warnings, how to use the adapter, the numbers, and how they were made."""
    r, searched = card.record, card.searched
    rows = [
        f"| {key} | {_role(r, key)} | {_show(r.before.get(key))} | {_show(n)} | {_show(r.delta.get(key))} | {n.n} |"
        for key, n in r.after.items()
    ]
    bounds = ", ".join(f"{k} {v:,.0f}" for k, v in r.config.get("budget", {}).items() if k != "name")
    spent = ", ".join(f"{k} {v:,.0f}" if k != "flops" else f"{k} {v:.2e}" for k, v in r.spent.items())
    tuning = f"; its settings were chosen in {r.tuning['trials']} trials, which are not in that" if r.tuning else ""
    split, provenance = _split(r), r.provenance
    versions = ", ".join(f"{name} {version}" for name, version in dict(provenance.get("versions", {})).items())
    place = card.repo or "PATH/TO/THIS/FOLDER"
    use = [line.replace('"adapter"', f'"{place}"') for line in usage(card.model_spec)]
    flags = [
        name
        for name, up in (
            ("fault", bool(r.fault)),
            ("hack", r.flags.hack),
            ("invalid", r.flags.invalid),
            ("one seed", r.flags.single_seed),
        )
        if up
    ]
    return "\n".join(
        [
            f"# {r.method} on {r.task}, {f'{r.model} as it is' if searched else f'a LoRA for {r.model}'}",
            "",
            *(line for text in card.warnings for line in (f"> **Warning.** {text}", "")),
            *([] if searched else ["```python", *use, "```", ""]),
            *(["![Before and after, on the same noise](samples.png)", ""] if card.has_samples else []),
            "| scorer/metric | role | before | after | difference | prompts |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"Means over the {split} prompts with 95 % intervals (images of a prompt clustered); differences are "
            f"paired by prompt on the same noise. Methods are trained on the training scorer alone. {seed_note(r)}",
            "",
            "| | |",
            "|---|---|",
            f"| method | {r.method}, training seed {r.seed}, ended by {r.stop} |",
            f"| budget | {bounds or 'none'} |",
            f"| spent | {spent}{tuning} |",
            f"| evaluated | task {r.task} version {r.task_version}, {split} split, evaluation seed "
            f"{r.config.get('evaluation', {}).get('seed', 'unknown')} |",
            *(f"| {name} prompts | sha256 `{digest}` |" for name, digest in r.prompts.items()),
            *(f"| scorer {name} | `{scorer.id}`, {scorer.role} |" for name, scorer in r.scorers.items()),
            *(f"| embedder {name} | `{text}` |" for name, text in r.embedders.items()),
            f"| weights of the base | `{provenance.get('weights', 'unknown')}` |",
            *(f"| transfer to {key} | {transfer_text(each)} |" for key, each in r.transfer.items()),
            f"| flags | {', '.join(flags) or 'none'} |",
            f"| verification | {verification_line(card.verified).removeprefix('Verification: ')} |",
            f"| code | gpobench `{provenance.get('revision') or 'unknown'}`; {versions} |",
            f"| machine | {provenance.get('machine', 'unknown')}, {provenance.get('dtype', 'unknown')} |",
            "",
        ]
    )


def _show(n: Number | None) -> str:
    """Return a number with its interval as text."""
    if n is None:
        return ""
    if n.mean is None or n.ci[0] is None or n.ci[1] is None:
        return "not scored"
    return f"{n.mean:.3f} [{n.ci[0]:.3f}, {n.ci[1]:.3f}]"


def _results(r: Record, benchmark: str) -> str:
    """Return the results in the hub's newer format, one entry a metric; the interval goes into the notes, the only place for it."""
    import yaml

    try:
        from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml, parse_eval_result_entries
    except ImportError:
        raise Missing(
            "results for a benchmark need a newer hub library; install with: pip install -U huggingface_hub"
        ) from None
    entries = [
        EvalResultEntry(
            dataset_id=benchmark,
            task_id=key,
            value=n.mean,
            notes=f"95 % interval {_show(n)} over {n.n} {_split(r)} prompts, scorer {_id(r, key)}, task version {r.task_version}",
        )
        for key, n in r.after.items()
        if n.mean is not None
    ]
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
    if parse_eval_result_entries(yaml.safe_load(text)) != entries:
        raise RuntimeError("the evaluation results do not read back as they were written")
    return text
