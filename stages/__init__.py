"""The stages of self-play fine-tuning: each reads artifacts and writes one artifact."""
