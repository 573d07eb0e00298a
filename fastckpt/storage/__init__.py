"""Where bytes go. Storage knows names and bytes, nothing else; ``store.py`` is the contract."""
