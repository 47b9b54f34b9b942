"""Run the command line: python -m hf2mnn.cli."""

from hf2mnn.cli import main

main()
