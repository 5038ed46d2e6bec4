"""NaN in a request's latents: that request fails, at that step, alone, if it is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from conformance.case import CASES
from conformance.families import ltx_2  # noqa: F401 - its cases
from driving import Driver, alone, config, distance, request

from steploom.worker.runner import Runner

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 4, "max_sequence_length": 16}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("checked", [True, False])
def test_who_breaks_fails_at_that_step_and_its_mates_do_not(value: float, checked: bool) -> None:
    pipe = tiny.sd3()
    asked = [request(f"r{n}", f"a cat {n}", n, **SMALL) for n in range(4)]
    expected = [alone(pipe, one) for one in asked]
    runner = Runner.from_pipeline(pipe, config(check_finite=checked))
    driver = Driver(runner)
    driver.drain([request("warm", "a dog", 9, **SMALL), request("warm2", "a bird", 8, **SMALL)])  # verified by now

    def breaks(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """In the third step of the second request: an overflow somewhere in the model, of its rows alone."""
        if driver.ticks == started + 3:
            rows = len(output[0]) // 4
            output[0].unflatten(0, (rows, 4))[:, 1, 0, 0] = value
        return output

    handle = pipe.transformer.register_forward_hook(breaks, with_kwargs=True)
    started = driver.ticks
    finished = driver.drain(asked)
    handle.remove()
    broken = finished["r1"]
    if checked:
        assert broken.error is not None
        assert broken.error.kind == "GenerationFailed"
        assert "check_finite=True: NaN or Inf in the latents after step 3 of 4" in broken.error.message
        assert len(driver.reports["r1"]) == 3, "it takes part in no further step"
    else:
        assert broken.error is None
        assert not torch.as_tensor(broken.output.images).isfinite().all()
    for n in (0, 2, 3):
        assert finished[f"r{n}"].error is None
        assert distance(finished[f"r{n}"].output, expected[n]) <= 1e-4
    assert driver.drain([request("next", "a dog", 9, **SMALL)])["next"].error is None


@pytest.mark.parametrize("left", [1, 0], ids=["in the last step but one", "in the last step"])
def test_latents_that_a_copy_of_the_noise_scheduler_steps_are_looked_at(left: int) -> None:
    """LTX-2's sound: nothing of the video shows that it is broken."""
    case = CASES["LTX2Pipeline"]
    pipe = case.build()
    driver = Driver(Runner.from_pipeline(pipe, config(check_finite=True, max_batch=1)))
    asked = case.request(0, seed=1)
    asked.params["num_inference_steps"] = 4
    driver.tick([asked])
    told = driver.reports[asked.request_id]
    assert told[0].total_steps is not None
    last = told[0].total_steps - 1

    def breaks(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if told[-1].step == last - left:
            output[1][...] = float("nan")

    pipe.transformer.register_forward_hook(breaks, with_kwargs=True)
    error = driver.drain()[asked.request_id].error
    assert error is not None
    assert f"check_finite=True: NaN or Inf in the latents after step {last + 1} of {last + 1}" in error.message


@pytest.mark.parametrize("output_type", ["pil", "pt", "np"])
def test_an_output_that_is_not_finite_fails(output_type: str) -> None:
    pipe = tiny.sd3()
    pipe.vae.decoder.register_forward_hook(lambda module, args, output: output * float("nan"))
    driver = Driver(Runner.from_pipeline(pipe, config(check_finite=True)))
    one = request("r", "a cat", 1, output_type=output_type, **SMALL)
    error = driver.drain([one])["r"].error
    assert error is not None
    assert "check_finite=True: NaN or Inf in the output" in error.message
