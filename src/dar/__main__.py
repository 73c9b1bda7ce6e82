"""`python -m dar` is the command `dar`."""

from dar.cli.app import main

main()
