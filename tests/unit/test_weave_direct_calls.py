"""What a direct call of the application's pipeline sets on a module for a while is no change of the module."""

from __future__ import annotations

import pytest
import tiny
from diffusers.models.attention_processor import AttnProcessor

from steploom.weave.modules.shared import SharedModule


@pytest.mark.parametrize("ends", [True, False], ids=["it ends", "it was none"])
def test_a_direct_call_that_ends_while_changes_are_looked_for_is_none(ends: bool) -> None:
    pipe = tiny.sdxl()
    shared = SharedModule("unet", pipe.unet, isolated=True)
    assert not shared.changed(lambda: False)
    before = dict(pipe.unet.attn_processors)
    pipe.unet.set_attn_processor(AttnProcessor())

    def called() -> bool:
        """The call has ended by now, and taken back what it had set; or there was none, and the application has."""
        if ends:
            pipe.unet.set_attn_processor(dict(before))
        return False

    assert shared.changed(called) is not ends
