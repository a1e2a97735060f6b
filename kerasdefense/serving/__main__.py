"""python -m kerasdefense.serving IMAGE...: ask a served model about image files."""

import sys

if __name__ == "__main__":
    try:
        from kerasdefense.serving.command import main
    except ModuleNotFoundError as error:
        lacks = f"{error.name} is not installed"
        sys.exit(f"error: {lacks}, which the extra serving brings; install it with: pip install '.[serving]'")
    sys.exit(main(sys.argv[1:]))
