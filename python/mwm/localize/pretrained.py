"""Models of transformers read from a folder or the hub: only classes that the caller names, only safetensors, never code of the checkpoint's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mwm.localize.checkpoints import check_sizes, commit_of, content_hash, first_line, hub_answers, local_folder, quiet_transformers
from mwm.localize.presets import pinned


@dataclass(frozen=True)
class Pretrained:
    """What a checkpoint holds.

    Attributes:
        model: The model, in evaluation mode on the CPU, without gradients.
        processor: Its processor: image processor and, where it reads text, tokenizer.
        kind: `model_type` of its configuration.
        fingerprint: Hash of the files of a folder, or hub name and commit.
    """

    model: Any
    processor: Any
    kind: str
    fingerprint: str


def read_pretrained(
    checkpoint: str | Path, name: str, kinds: dict[str, tuple[str, str]], example: str, *, revision: str | None = None, offline: bool = False, ignored: tuple[str, ...] = ()
) -> Pretrained:
    """Read a checkpoint whose `model_type` is one of those given.

    Weights are read from safetensors; of a preset whose commit holds none also from its .bin file, as bare tensors.

    Args:
        checkpoint: A preset, a folder that `save_pretrained` wrote, or a hub name; only presets and hub names are ever fetched.
        name: Who asks: a localizer of the presets; also for messages.
        kinds: `model_type` → names of the model's and the processor's class in transformers.
        example: A hub name, for messages.
        revision: Commit, branch or tag of a hub name; None for the preset's, else the newest.
        offline: Look a hub name up on disk only.
        ignored: Beginnings of names of weights that may be missing.

    Raises:
        ValueError: it is no such model, is not there, lacks weights, or transformers is too old for it; one sentence.
    """
    checkpoint, revision, known = pinned(checkpoint, name, revision)
    folder = local_folder(str(checkpoint), name, example)
    source: str | Path = folder or str(checkpoint)
    local_only = offline or folder is not None or not hub_answers()
    try:
        import transformers  # noqa: F401  before quiet_transformers does, which has no sentence for its absence

        with quiet_transformers(bars=not local_only):
            model, processor, kind, report = _read(source, name, kinds, example, {"local_files_only": local_only, "revision": revision},
                                                    bare_tensors=known is not None and known.bare_tensors)
    except OSError as error:
        if folder is not None:
            raise ValueError(f"{name}: checkpoint must hold config.json, a processor and weights as safetensors, got {str(checkpoint)!r} without some of them "
                             f"({first_line(error)}). Save model and processor with save_pretrained.") from error
        raise ValueError(f"{name}: checkpoint {str(checkpoint)!r} is neither a local folder nor could it be fetched from the hub with weights as safetensors "
                         f"({first_line(error)}). Check the name and the network, or download it and give the folder.") from error
    except _Refused:
        raise
    except ImportError as error:
        raise ValueError(f"{name}: transformers and what its model needs must be installed, got {first_line(error)}. Type `pip install -U transformers`.") from error
    except Exception as error:
        raise ValueError(f"{name}: checkpoint {str(checkpoint)!r} cannot be read ({first_line(error)}). Download or save it again.") from error
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(ignored or ("\0",)))
    wrong = sorted(str(key) for key in report.get("mismatched_keys") or ())
    if missing or wrong:
        said = f"without {len(missing)} of them (first: {missing[0]})" if missing else f"with {len(wrong)} of other shapes (first: {wrong[0][:80]})"
        raise ValueError(f"{name}: checkpoint must hold all weights of {kinds[kind][0]}, got {str(checkpoint)!r} {said}. Give the checkpoint of a whole model.")
    mark = content_hash(folder) if folder else f"{checkpoint}@{commit_of(checkpoint, revision)}"
    return Pretrained(model.eval().requires_grad_(False), processor, kind, mark)


class _Refused(ValueError):
    """A sentence of ours, not to be wrapped in another."""


def _read(source: str | Path, name: str, kinds: dict[str, tuple[str, str]], example: str, options: dict[str, Any], *,
          bare_tensors: bool = False) -> tuple[Any, Any, str, dict[str, Any]]:
    import transformers

    found, _ = transformers.PretrainedConfig.get_config_dict(source, **options)
    kind = found.get("model_type", "unknown")
    if kind not in kinds:
        raise _Refused(f"{name}: checkpoint must be a model of type {', '.join(sorted(kinds))}, got {str(source)!r} of type {kind!r}. Give one such as {example}.")
    lacking = [wanted for wanted in kinds[kind] if not hasattr(transformers, wanted)]
    if lacking:
        raise _Refused(f"{name}: transformers must have {lacking[0]} for a checkpoint of type {kind!r}, got version {transformers.__version__} without it. "
                       "Install a newer transformers.")
    model_class, processor_class = (getattr(transformers, wanted) for wanted in kinds[kind])
    processor = processor_class.from_pretrained(source, trust_remote_code=False, **options)  # said, or transformers asks on the terminal
    try:
        check_sizes(processor, name, str(source))
    except ValueError as error:
        raise _Refused(str(error)) from error
    try:
        model, report = model_class.from_pretrained(source, use_safetensors=True, output_loading_info=True, **options)
    except OSError:
        if not bare_tensors:
            raise
        model, report = model_class.from_pretrained(source, use_safetensors=False, weights_only=True, output_loading_info=True, **options)
    return model, processor, kind, report
