"""Test a results folder and print its table; export its tasks as networks of their own.

python evaluate.py results/demo
python evaluate.py results/demo --export exported
python evaluate.py results/demo --verify
"""

from taps.cli.main import run

if __name__ == "__main__":
    run("evaluate")
