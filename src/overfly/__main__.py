"""The program ``overfly``."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C while it is imported exits with status 130 too."""
    try:
        from overfly import cli
    except KeyboardInterrupt:
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
