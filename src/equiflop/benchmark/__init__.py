"""Networks timed side by side: what ``equiflop bench`` runs."""
