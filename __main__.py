"""Runs the command line: `python -m gpobench run ...` is `gpobench run ...`."""

from .bench.commands.app import main

if __name__ == "__main__":
    main()
