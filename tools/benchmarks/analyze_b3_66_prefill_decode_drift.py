#!/usr/bin/env python3
"""Judges GRETA StageTrace files: writes a report and a table of every compared tensor. See --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from kvdrift.cli.greta import main

if __name__ == "__main__":
    main()
