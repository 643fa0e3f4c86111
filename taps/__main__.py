"""``taps train|joint|mtl|evaluate|tasks|data …``."""

from taps.cli.main import main

main()
