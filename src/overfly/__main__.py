"""The program ``overfly``: small, so that Ctrl-C is answered from its first moment on."""

import sys


def main() -> None:
    """Run the command line; being stopped while that is read has its exit status too."""
    try:
        from overfly.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
