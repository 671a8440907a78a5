"""`python -m videovae`, and the command `videovae`."""

import sys


def main() -> int:
    """Run the command; where the trainer's own packages are not installed, say how to get them.

    Ranks: local.
    """
    try:
        from videovae.cli import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("videovae", "rankwise"):
            raise
        print(f"error: videovae needs {error.name}: pip install 'rankwise[videovae]'", file=sys.stderr)
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
