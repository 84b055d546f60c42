"""`python cli.py <command>`, the same as the installed `sdft <command>`."""

from sdft_lightning.cli import main

if __name__ == "__main__":
    main()
