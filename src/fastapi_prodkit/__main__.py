"""The command `fastapi-prodkit`, or `python -m fastapi_prodkit`. Without its extra, it names the extra."""

import sys

from fastapi_prodkit.exceptions import MissingExtraError

__all__ = ["main"]


def main() -> int:
    """Run the command line and return its exit code."""
    try:
        from fastapi_prodkit import cli  # noqa: PLC0415 - it needs the extra
    except MissingExtraError as error:
        sys.stderr.write(f"fastapi-prodkit: {error}\n")
        return 1
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
