"""Divergences and token losses, exact in bounded memory; masks."""
