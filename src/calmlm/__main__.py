"""``python -m calmlm``: the command line, for launchers such as torchrun that start modules."""

from calmlm.cli import main

raise SystemExit(main())
