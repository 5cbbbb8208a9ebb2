"""What a network's draws cost, and how well distributions fit its statistics."""
