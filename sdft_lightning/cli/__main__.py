"""`python -m sdft_lightning.cli <command>`, the same as the installed `sdft <command>`."""

from sdft_lightning.cli.entry import main

if __name__ == "__main__":
    main()
