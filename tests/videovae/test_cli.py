"""`videovae`, as people and scripts start it: real processes, real signals, real files."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from rankwise.checkpoint import CheckpointManager
from videovae.cli import main
from videovae.data.synthetic import make_clips
from videovae.data.video import iter_frames, probe, write_video

VIDEOVAE = [sys.executable, "-m", "videovae"]
# The smallest run with everything in it; each step takes a few hundredths of a second.
TINY = [
    *("--preset", "debug", "--model.base-channels", "4", "--discriminator.base-channels", "4", "--log-every", "1"),
    *("--clips.num-frames", "5", "--clips.height", "16", "--clips.width", "16", "--clips.num-heldout-clips", "2"),
    *("--clips.batch-size", "1", "--loss.disc-start", "2", "--seed", "0", "--eval-every", "100"),
]


def run(*arguments: str, **options: object) -> "subprocess.CompletedProcess[str]":
    command = [*VIDEOVAE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, **options)  # type: ignore[call-overload,no-any-return]


def steps(run_dir: Path) -> list[int]:
    return CheckpointManager(run_dir / "checkpoints").steps()


def logged_steps(run_dir: Path) -> int:
    path = run_dir / "metrics" / "rank-00000.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(condition: Callable[[], bool], timeout_seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = CheckpointManager(run_dir / "checkpoints").read("vae", step)
    return state


@pytest.fixture(scope="module")
def trained(clips_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps on two ranks, started as scripts will start it."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    result = run(
        *("train", *TINY, "--data", str(clips_dir), "--run-dir", str(run_dir)),
        *("--num-steps", "6", "--nproc", "2", "--save-every", "4"),
    )
    assert result.returncode == 0, result.stderr
    assert "step 6/6" in result.stderr
    assert steps(run_dir) == [4, 6]
    return run_dir


def test_train_stopped_by_sigterm_ends_well_and_goes_on_to_the_same_weights(clips_dir: Path, tmp_path: Path) -> None:
    arguments = ["train", *TINY, "--data", str(clips_dir), "--nproc", "2", "--num-steps", "60", "--save-every", "50"]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    job = subprocess.Popen([*VIDEOVAE, *arguments, "--run-dir", str(stopped)], stderr=subprocess.PIPE, text=True)
    assert wait_for(lambda: logged_steps(stopped) > 8)
    job.send_signal(signal.SIGTERM)
    _, log = job.communicate(timeout=60)
    assert job.returncode == 0, log
    assert "the same command goes on from here" in log
    assert "Traceback" not in log
    (last,) = steps(stopped)
    assert 8 <= last < 60

    assert run(*arguments, "--run-dir", str(stopped)).returncode == 0
    assert run(*arguments, "--run-dir", str(whole)).returncode == 0
    expected, resumed = weights(whole, 60), weights(stopped, 60)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("seconds", [0.3, 1.5, 3.0, 4.5])
def test_a_signal_before_the_first_step_is_no_failure(seconds: float, clips_dir: Path, tmp_path: Path) -> None:
    arguments = ["train", *TINY, "--data", str(clips_dir), "--nproc", "2", "--run-dir", str(tmp_path / "run")]
    job = subprocess.Popen([*VIDEOVAE, *arguments, "--num-steps", "100000"], stderr=subprocess.PIPE, text=True)
    # Not to wait for something, but to hit whatever the start is at: imports, rendezvous, spawning, set-up.
    with contextlib.suppress(subprocess.TimeoutExpired):
        job.wait(seconds)
    job.terminate()
    _, log = job.communicate(timeout=60)
    # Python itself takes some tenths of a second, in which nobody can answer; more of them on a busy machine.
    assert job.returncode in ((0, -signal.SIGTERM) if seconds < 2 else (0,)), log
    assert "Traceback" not in log


def test_a_signal_while_one_rank_is_still_importing_is_no_failure(clips_dir: Path, tmp_path: Path) -> None:
    late = "import os, time\nif os.environ.get('RANK') == '1':\n    time.sleep(6)\n"
    (tmp_path / "sitecustomize.py").write_text(late)
    run_dir = tmp_path / "run"
    arguments = ["train", *TINY, "--data", str(clips_dir), "--nproc", "2", "--run-dir", str(run_dir)]
    job = subprocess.Popen(
        [*VIDEOVAE, *arguments], stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)}
    )
    assert wait_for((run_dir / "logs" / "rank-00000.jsonl").exists)
    job.terminate()
    _, log = job.communicate(timeout=60)
    assert job.returncode == 0, log
    assert "Traceback" not in log


def test_a_hangup_behind_nohup_is_ignored(clips_dir: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = ["train", *TINY, "--data", str(clips_dir), "--nproc", "2", "--run-dir", str(run_dir)]
    job = subprocess.Popen(
        ["nohup", *VIDEOVAE, *arguments, "--num-steps", "12"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert wait_for((run_dir / "logs" / "rank-00000.jsonl").exists)
    job.send_signal(signal.SIGHUP)
    _, log = job.communicate(timeout=60)
    assert job.returncode == 0, log
    assert steps(run_dir)[-1] == 12


def test_an_environment_that_contradicts_itself_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train"]) == 2
    assert "RANK=5 WORLD_SIZE=2" in capsys.readouterr().err


@pytest.fixture
def killed(clips_dir: Path, tmp_path: Path) -> Path:
    """A run whose launcher was killed by SIGKILL amid its steps; all of its processes end within five seconds."""
    run_dir = tmp_path / "killed"
    command = [*VIDEOVAE, "train", *TINY, "--data", str(clips_dir), "--run-dir", str(run_dir)]
    job = subprocess.Popen(
        [*command, "--nproc", "2", "--num-steps", "5000", "--save-every", "3"], stderr=subprocess.DEVNULL
    )
    assert wait_for(lambda: len(steps(run_dir)) > 2)
    family = psutil.Process(job.pid).children(recursive=True)
    assert len(family) >= 4  # two ranks, each with a loader worker
    job.kill()
    job.wait()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    return run_dir


def test_after_sigkill_the_newest_checkpoint_loads_and_training_goes_on(killed: Path, clips_dir: Path) -> None:
    newest = steps(killed)[-1]
    result = run(
        *("train", *TINY, "--data", str(clips_dir), "--run-dir", str(killed)),
        *("--nproc", "2", "--num-steps", str(newest + 2)),
    )
    assert result.returncode == 0, result.stderr
    assert f"going on from {killed}" in result.stderr
    assert steps(killed)[-1] == newest + 2
    lines = (killed / "metrics" / "rank-00000.jsonl").read_text().splitlines()
    assert all(json.loads(line) for line in lines)


@pytest.mark.parametrize(
    "launcher", [["torch.distributed.run", "--standalone", "--nproc-per-node", "2"], ["rankwise", "run"]]
)
def test_train_joins_the_ranks_of_a_launcher(launcher: list[str], clips_dir: Path, tmp_path: Path) -> None:
    arguments = ["train", *TINY, "--data", str(clips_dir), "--run-dir", str(tmp_path / "run"), "--num-steps", "2"]
    command = [sys.executable, "-m", *launcher, "-m", "videovae", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step-00000002" / "manifest.json").read_text())
    assert manifest["world_size"] == (2 if "2" in launcher else 1)


def test_nproc_that_a_launcher_contradicts_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clips_dir: Path, tmp_path: Path
) -> None:
    places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--data", str(clips_dir), "--run-dir", str(tmp_path / "run"), "--nproc", "4"]) == 2
    assert capsys.readouterr().err.startswith("error: --nproc is 4, but env has started 2 processes")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{tmp}/nowhere"], "nowhere does not exist"),
        (["--data", "{tmp}/empty"], "empty is empty"),
        (["--data", "{tmp}/text"], "holds 1 entries but no video"),
        (["--data", "{tmp}/text/readme.txt"], "is a file, not a folder"),
        (["--clips.num-frames", "16"], "clips.num_frames is 16"),
        (["--clips.height", "60"], "clips.height is 60"),
        (["--resume", "{tmp}/nowhere"], "nowhere does not exist"),
        (["--save-every", "0"], "save_every is 0"),
        (["--loss.perceptual-weight", "1"], "perceptual"),
        (["--nproc", "0"], "--nproc is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--timeout-seconds", "nan"], "timeout_seconds is nan"),
        (["--discriminator.in-channels", "5"], "discriminator.in_channels is 5"),
        (
            ["--loss.perceptual-weight", "1", "--loss.perceptual-weights", "{tmp}/none.pth"],
            "none.pth, which does not exist",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_two(
    arguments: list[str], message: str, tmp_path: Path, clips_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "readme.txt").touch()
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    defaults = [] if "--data" in given else ["--data", str(clips_dir)]
    assert main(["train", *defaults, "--run-dir", str(tmp_path / "run"), *given]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1


def test_settings_of_another_run_are_refused_before_a_rank_starts(
    trained: Path, clips_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", *TINY, "--data", str(clips_dir), "--run-dir", str(trained), "--nproc", "2"]
    assert main([*arguments, "--optimizer.learning-rate", "0.5"]) == 2
    assert "optimizer.learning_rate: 0.002 -> 0.5" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_told_in_a_line_and_loses_nothing(clips_dir: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("this machine does not let us mount a small disk")
    try:
        run_dir = disk / "run"
        result = run(
            *("train", *TINY, "--data", str(clips_dir), "--run-dir", str(run_dir)),
            *("--nproc", "2", "--num-steps", "400", "--save-every", "5"),
        )
        assert result.returncode == 2, result.stderr
        assert "No space left on device" in result.stderr
        assert "Traceback" not in result.stderr
        saved = steps(run_dir)
        assert saved
        assert weights(run_dir, saved[-1])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_without_data_clips_are_made(tmp_path: Path) -> None:
    result = run("train", *TINY, "--run-dir", str(tmp_path / "run"), "--num-steps", "1", "--nproc", "1")
    assert result.returncode == 0, result.stderr
    made = sorted((tmp_path / "run" / "clips").glob("*.mp4"))
    assert len(made) >= 8
    assert probe(made[0]).num_frames > 17


@pytest.mark.parametrize(("height", "width", "num_frames"), [(30, 44, 7), (17, 33, 1), (64, 48, 13)])
def test_reconstruct_keeps_size_rate_and_length(
    height: int, width: int, num_frames: int, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_clips(tmp_path / "clips", num_clips=1, num_frames=num_frames, height=height, width=width, fps=12)
    source, target = tmp_path / "clips" / "clip-00000.mp4", tmp_path / "out.mp4"
    assert main(["reconstruct", str(trained), str(source), str(target)]) == 0
    info = probe(target)
    assert (info.height, info.width, info.num_frames, info.fps) == (height, width, num_frames, 12)
    assert "PSNR" in capsys.readouterr().out


def test_reconstruct_takes_a_run_a_checkpoint_and_an_exported_folder(
    trained: Path, clips_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(trained), str(tmp_path / "exported")]) == 0
    assert main(["export", str(trained), str(tmp_path / "raw"), "--weights", "raw"]) == 0
    capsys.readouterr()
    source = clips_dir / "clip-00001.mp4"
    sources = [trained, trained / "checkpoints" / "step-00000006", tmp_path / "exported", tmp_path / "raw"]
    printed = []
    for number, origin in enumerate([*sources, trained / "checkpoints" / "step-00000004"]):
        assert main(["reconstruct", str(origin), str(source), str(tmp_path / f"{number}.mp4")]) == 0
        printed.append(capsys.readouterr().out.split("PSNR ")[1].split(",")[0])
    frames = [list(iter_frames(tmp_path / f"{number}.mp4")) for number in range(5)]
    assert printed[0] == printed[1] == printed[2]
    assert all((a == b).all() for a, b in zip(frames[0], frames[2], strict=True))
    assert not all((a == b).all() for a, b in zip(frames[0], frames[3], strict=True))
    assert not all((a == b).all() for a, b in zip(frames[0], frames[4], strict=True))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["reconstruct", "{tmp}/nowhere", "{clip}", "{tmp}/out.mp4"], "nowhere does not exist"),
        (["reconstruct", "{tmp}", "{clip}", "{tmp}/out.mp4"], "has no whole checkpoint"),
        (["reconstruct", "{run}", "{tmp}/nowhere.mp4", "{tmp}/out.mp4"], "nowhere.mp4"),
        (["reconstruct", "{run}", "{clip}", "{tmp}/out.gif"], "out.gif"),
        (["reconstruct", "{run}", "{tmp}/long.mp4", "{tmp}/out.mp4"], "has 26 frames of 1280x720"),
        (["export", "{run}", "{run}"], "is not empty"),
        (["make-clips", "{run}"], "run"),
        (["walk"], "'walk' is no command"),
    ],
)
def test_bad_input_after_training_is_told_too(
    command: list[str],
    message: str,
    trained: Path,
    clips_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "long" in "".join(command):
        import numpy as np

        write_video(tmp_path / "long.mp4", np.zeros((26, 720, 1280, 3), np.uint8), fps=25)
    clip = clips_dir / "clip-00000.mp4"
    given = [argument.format(tmp=tmp_path, run=trained, clip=clip) for argument in command]
    assert main(given) == 2
    printed = capsys.readouterr().err
    assert "error: " in printed
    assert message in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_lists_the_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == (0 if arguments else 2)
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("train", "make-clips", "reconstruct", "export"))


def test_every_field_of_the_config_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    for option in ("--num-steps", "--model.base-channels", "--loss.disc-start", "--optimizer.betas", "--clips.height"):
        assert option in printed


def test_without_the_extra_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['tyro'] = None; from videovae.__main__ import main; sys.exit(main())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: videovae needs tyro: pip install 'rankwise[videovae]'\n"
