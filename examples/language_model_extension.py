"""A diffusion language model served, and its own generation loop run in the worker, where the model lives.

The model is a DiffusionGemma with random weights, made here in a moment: what it says is noise, how it comes to say it
is not. Requests are streamed through the pipeline; meanwhile ``collective_rpc`` calls a method of ``OwnLoop`` in the
worker, which runs the loop that the model itself brings along (``model.generate``), between two ticks.

python examples/language_model_extension.py [FOLDER]
"""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from steploom import AsyncDiffusionEngine, Commit, Draft, Finished

HERE = Path(__file__).resolve()
PROMPTS = ("Why is the sky blue?", "Name a colour.")


class OwnLoop:
    """Methods for the worker; ``self.runner.pipeline`` is the pipeline that it serves."""

    runner: Any

    def own_generate(self, prompt: str, length: int, seed: int) -> dict[str, Any]:
        """The model's own loop, from a prompt to the text of ``length`` new tokens."""
        import torch

        model, tokenizer = self.runner.pipeline.model, self.runner.pipeline.processor
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.random.fork_rng():  # the loop draws from torch's own generator, which is not ours to disturb
            torch.manual_seed(seed)
            made = model.generate(ids, max_new_tokens=length)
        new = made.sequences[0, ids.shape[1] :]
        return {"text": tokenizer.decode(new, skip_special_tokens=True), "tokens": new.tolist(), "process": os.getpid()}


def build(folder: Path) -> Path:
    """A tiny model in diffusers' layout, with a tokenizer of single bytes."""
    import torch
    from diffusers import BlockRefinementScheduler, DiffusionGemmaPipeline
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({"<pad>": 0, "<s>": 1, "</s>": 2, **{c: i + 3 for i, c in enumerate(letters)}}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    text = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8,
            "num_global_key_value_heads": 2, "sliding_window": 32, "num_experts": 4, "top_k_experts": 2,
            "moe_intermediate_size": 16, "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 2, "head_dim": 8, "patch_size": 8}  # fmt: skip
    torch.manual_seed(0)
    config = DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=8)
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    DiffusionGemmaPipeline(model, BlockRefinementScheduler(), tokenizer).save_pretrained(folder)
    return folder


async def follow(engine: AsyncDiffusionEngine, place: int) -> None:
    """One request: drafts come and go, commits stay."""
    said = ""
    async with engine.stream(PROMPTS[place], seed=place, gen_length=24, num_inference_steps=6) as run:
        async for event in run:
            match event:
                case Draft(text=text):
                    print(f"request {place}: {said!r} and perhaps {text!r}")
                case Commit(text=text):
                    said += text
                    print(f"request {place}: {said!r}")
                case Finished(output=output):
                    assert output.text == said
                    shared = output.timings.mean_batch_requests
                    print(f"request {place} is done: {output.timings.steps} steps, {shared:.1f} requests a forward")
                case _:
                    pass


async def serve(model: Path) -> None:
    # The worker imports the extension by name: from this file, wherever the script was started.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    extension = f"{HERE.stem}.OwnLoop"
    async with (
        AsyncDiffusionEngine(model=str(model), torch_threads=1, worker_extension=extension) as engine,
        asyncio.TaskGroup() as tasks,
    ):
        for place in range(len(PROMPTS)):
            tasks.create_task(follow(engine, place))
        arguments = {"prompt": PROMPTS[0], "length": 16, "seed": 7}
        made = await engine.collective_rpc("own_generate", kwargs=arguments, unique_reply_rank=0)
        where = "in the worker" if made["process"] != os.getpid() else "here"
        print(f"its own loop, {where}: {len(made['tokens'])} tokens, {made['text']!r}")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    asyncio.run(serve(build(folder / "tiny-language-model")))


if __name__ == "__main__":
    main(Path(*sys.argv[1:] or ["out"]))
