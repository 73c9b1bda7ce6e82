"""`python -m dar` is the command `dar`."""

from dar.cli import main

main()
