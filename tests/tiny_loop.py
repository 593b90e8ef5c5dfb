"""A recipe whose whole loop takes seconds, and what its runs are compared by."""

from pathlib import Path

from stages.artifacts import read_manifest

RECIPE = """
name: tiny
chat: {template: plain}
prepare:
  format: word_sums
  word_sums: {num_examples: 90}
  heldout_size: 10
sft:
  init: random
  architecture: {num_layers: 2, hidden_size: 32, intermediate_size: 64, num_heads: 2}
  learning_rate: 3.0e-3
  batch_size: 16
  epochs: 2
  precision: fp32
generate: {max_new_tokens: 16, shard_rows: 32, engine: {batch_size: 16}}
reward: {name: gsm8k}
pair: {drop_cut_off: false}
score: {precision: fp32, shard_rows: 32}
train: {learning_rate: 1.0e-3, batch_size: 16, precision: fp32}
evaluate: {max_new_tokens: 16, precision: fp32}
promote: {metric: heldout_reward_accuracy, min_value: 0.0}
"""


def hashes(run: Path) -> dict[str, dict[str, str]]:
    """The reproducible bytes of every artifact of a run."""
    return {
        path.parent.relative_to(run).as_posix(): {
            f.path: f.sha256 for f in read_manifest(path.parent).files if not f.volatile
        }
        for path in sorted(run.rglob("manifest.json"))
    }
