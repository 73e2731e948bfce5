"""`python -m mtptrain`."""

from mtptrain.cli import main

main()
