"""Moves the pointer argv[1] to argv[2] by the decision argv[3].

`back` rolls it back, `again` undoes the roll-back from where that decision had moved it.
"""

import sys
from pathlib import Path

from stages.artifacts.pointer import PointerEntry, move_again, move_pointer, roll_back

path, target, decision = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
if target == "back":
    roll_back(path)
elif target == "again":
    move_again(path, decision)
else:
    move_pointer(path, PointerEntry(path=target, key=target, reason="r", decision_key=decision))
