"""Calls with an effect that one process should have alone: files written, runs of trackers started."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rankwise.check.program import Program
from rankwise.check.source import Class, Function
from rankwise.check.trace import Call, Trace
from rankwise.check.values import Ref, Thing, constant

_SECOND = frozenset(
    [
        "torch.save",
        "numpy.save_",
        "safetensors.torch.save_model",
        "torch.jit.save",
        "torchvision.utils.save_image",
        "shutil.copy",
        "shutil.copyfile",
        "shutil.copy2",
        "shutil.copytree",
        "shutil.move",
        "omegaconf.OmegaConf.save",
        "soundfile.write_",
        "os.symlink",
        "pickle.dump_",
        "joblib.dump",
        "torchaudio.save_",
    ]
)
_FIRST = frozenset(
    [
        "numpy.save",
        "numpy.savez",
        "numpy.savez_compressed",
        "numpy.savetxt",
        "matplotlib.pyplot.savefig",
        "cv2.imwrite",
        "imageio.imwrite",
        "imageio.mimsave",
        "soundfile.write",
        "torchaudio.save",
        "scipy.io.wavfile.write",
        "torchvision.io.write_video",
        "torchvision.io.write_png",
    ]
)
_METHODS = frozenset({"write_text", "write_bytes"})
_FIRST_OF_METHOD = frozenset(
    {"save_pretrained", "save_to_disk", "to_csv", "to_json", "to_parquet", "savefig", "to_pickle"}
)
_IS_CONFIG = re.compile(r"(?:^|[._])(?:cfg|config)$", re.IGNORECASE)
_SAME_EVERYWHERE = re.compile(r"token|processor|config|extractor|scheduler|feature", re.IGNORECASE)
_ON_THIS_NODE = re.compile(r"tmp|temp|cache|scratch|local_dir|/dev/", re.IGNORECASE)
_IS_PATH = re.compile(
    r"path|file|folder|_dir\b|ckpt|\.(?:pth?|ckpt|png|jpg|npy|jsonl?|ya?ml|csv|pkl|toml)\b", re.IGNORECASE
)
TRACKERS = frozenset(
    [
        "wandb.init",
        "mlflow.start_run",
        "neptune.init_run",
        "neptune.init",
        "comet_ml.Experiment",
        "comet_ml.start",
        "clearml.Task.init",
        "trackio.init",
        "aim.Run",
        "swanlab.init",
        "dvclive.Live",
        "sacred.Experiment",
    ]
)
_TRACKED = frozenset(
    [
        "wandb.log",
        "wandb.save",
        "wandb.finish",
        "wandb.log_artifact",
        "wandb.config.update",
        "wandb.watch",
        "mlflow.log_metric",
        "mlflow.log_metrics",
        "mlflow.log_artifact",
        "mlflow.log_params",
        "swanlab.log",
    ]
)
_UPLOADS = frozenset({"upload_file", "upload_folder"})
_SAVES = re.compile(
    r"_?(?:save|export|upload|push|dump)_?(?:model|checkpoint|ckpt|snapshot|state|weights|to_hub|.*checkpoint.*|pretrained|.*ckpt.*)\w*"
)

_OF_FORMAT = re.compile(
    r"(?:yaml|jsonl?|pickle|pkl|toml|csv)_?(?:save|dump|write)"
    r"|(?:save|dump|write)_(?:to_|as_)?(?:yaml|jsonl?|pickle|pkl|toml|csv)(?:_file)?"
)
_WRITERS = re.compile(r"(?:Summary|Tensor[Bb]oardX?)(?:Writer|Logger)")


def written_path(call: Call) -> ast.expr | None:
    """The expression of the path that a call writes; None where it writes none."""
    name, last = call.name, call.last
    if (call.callee is not None and not call.uncertain) or _knows_main(call):
        return None
    if name in ("open", "io.open", "codecs.open", "gzip.open"):
        mode = constant(call.argument(1, "mode"))
        is_path = not isinstance(constant(call.argument(0, "file")), int)
        writes = isinstance(mode, str) and mode[:1] in ("w", "x", "a")
        return call.argument_node(0, "file") if writes and is_path else None
    if last == "open" and isinstance(call.node.func, ast.Attribute) and call.receiver is not None:
        mode = constant(call.argument(0, "mode"))
        writes = isinstance(mode, str) and mode[:1] in ("w", "x", "a") and not isinstance(call.receiver.data, Ref)
        return call.node.func.value if writes else None
    if name in _SECOND or (last == "save_file" and "safetensors" in name) or name.endswith("OmegaConf.save"):
        return call.argument_node(1, "f", "filename", "dst", "fp")
    if name in _FIRST:
        return call.argument_node(0, "file", "fname", "filename", "path", "uri")
    if isinstance(call.function.data, Ref) and _OF_FORMAT.fullmatch(last):
        return next((one for one in call.node.args[:2] if _IS_PATH.search(call.module.text(one, 200))), None)
    if isinstance(call.node.func, ast.Attribute):
        if last in _METHODS:
            return call.node.func.value
        if last == "dump" and len(call.node.args) == 1 and _IS_CONFIG.search(call.module.text(call.node.func.value)):
            return call.node.args[0]
        if last in _FIRST_OF_METHOD and not _SAME_EVERYWHERE.search(call.module.text(call.node.func.value)):
            return call.argument_node(0, "save_directory", "path_or_buf", "fname", "path")
    return None


def _knows_main(call: Call) -> bool:
    """Whether it is told if this is the main process."""
    told = (one.id for one in call.node.args if isinstance(one, ast.Name))
    return "is_main_process" in call.keywords or "is_main_process" in told


def starts_tracker(call: Call) -> bool:
    """Whether a call starts a run of an experiment tracker, or an event file."""
    if call.callee is not None and not call.uncertain:
        return False
    return call.name in TRACKERS or (call.last == "SummaryWriter" and call.callee is None)


def makes_folder(call: Call) -> bool:
    """Whether a call makes a folder and fails where it is there."""
    if constant(call.argument(-1, "exist_ok")) is True or (call.callee is not None and not call.uncertain):
        return False
    if call.name in ("os.makedirs", "os.mkdir"):
        return not (call.name == "os.makedirs" and constant(call.argument(2, "exist_ok")) is True)
    if call.last != "mkdir" or not isinstance(call.node.func, ast.Attribute):
        return False
    place = call.receiver.data if call.receiver is not None else None
    return not (isinstance(place, Ref) and place.name != "<index>") and constant(call.argument(2)) is not True


def global_work(program: Program, call: Call) -> str | None:
    """What a call does that should be done once in all, in words; None where nothing is seen."""
    found = program.shared("work of functions", dict)
    assert isinstance(found, dict)
    return _work(program, call, found, 0)


def _work(program: Program, call: Call, known: dict[Function, str | None], depth: int) -> str | None:
    shown = call.module.text(call.node.func)
    if isinstance(call.callee, Function) and not call.uncertain:
        if call.callee not in known:
            known[call.callee] = None
            trace = program.trace_of.get(call.callee)
            if trace is not None and depth < 6 and not trace.guard:
                inner = (_work(program, one, known, depth + 1) for one in trace.calls if not one.guard_on_ranks)
                known[call.callee] = next((work for work in inner if work), None)
        work = known[call.callee]
        return f"{shown}(): {work}" if work else None
    path = written_path(call)
    if path is not None and call.name.startswith("shutil."):
        return None  # as a rule a copy for this node
    if path is not None:
        return (
            None if _ON_THIS_NODE.search(call.module.text(path)) else f"{shown}() writes {call.module.text(path, 40)}"
        )
    if starts_tracker(call) or (call.callee is None and _WRITERS.fullmatch(call.last)):
        return f"{shown}()"
    if call.name in _TRACKED or (call.last in _UPLOADS and call.callee is None):
        return f"{shown}()"
    if makes_folder(call) and not _is_looked_for(call):
        return f"{shown}() makes a folder"
    thing = call.receiver.data if call.receiver is not None else None
    if isinstance(call.callee, Class) or isinstance(thing, Thing):
        return None
    if call.last == "save" and call.node.args and _IS_PATH.search(call.module.text(call.node.args[0])):
        return f"{shown}()"
    if _SAVES.fullmatch(call.last) and not call.name.startswith(("torch.", "tokenizer")):
        return f"{shown}()"
    return None


def _is_looked_for(call: Call) -> bool:
    """Whether the lines above ask if it is there."""
    lines = call.module.lines[max(call.node.lineno - 4, 0) : call.node.lineno]
    return any(re.search(r"exists\(|isdir\(|is_dir\(", line) for line in lines)


def calls_with(program: Program) -> Iterator[tuple[Trace, Call]]:
    """All calls that are written down."""
    for trace in program.traces:
        for call in trace.calls:
            yield trace, call
