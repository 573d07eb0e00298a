"""``python -m bench.headline`` prints the table of the README's headline."""

from __future__ import annotations

from bench.headline.table import table

if __name__ == "__main__":
    print(table())
