"""What a run leaves behind: cards, and the folder that holds them."""
