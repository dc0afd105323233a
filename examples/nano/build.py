"""Builds a pretrained nano FLUX: every part of FLUX.1-dev, trained from nothing on drawings.

    python examples/nano/build.py --work DIR [--stage all] [--minutes 36] [--out OUT]

The pictures are `draw.py`'s: one colored shape somewhere on a gray background, 64 pixels square.
Stages, each seeded, saved in DIR once a minute and taken up where it was left:

    vae          the autoencoder, on the drawings
    text         CLIP, until its pooled output tells captions apart (T5 stays as it is drawn)
    transformer  flow matching on latents and captions, for at most --minutes
    judge        a classifier of the drawings
    export       OUT in diffusers' layout, in half precision, with the judge beside it; 100 captions
                 are sampled, and how many pictures show what they should goes to OUT/judge.json

A stage first runs those before it that it needs, which takes no time where they are done.
"""

import argparse
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
STAGES = ("vae", "text", "transformer", "judge", "export")
T5_SEED = 1
TRANSFORMER_SEED = 3
SAMPLES = 100
SAMPLE_SEED = 11


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--out", type=Path, help="the finished folder (default WORK/model)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="the stage's limit")
    args = parser.parse_args()
    sys.path.insert(0, str(HERE.parent.parent))  # fluxfast need not be installed
    args.work.mkdir(parents=True, exist_ok=True)
    build = Build(args.work, args.minutes)
    if args.stage in ("export", "all"):
        build.export(args.out or args.work / "model")
    else:
        getattr(build, args.stage)()


class Build:
    """The parts, each trained or read back when it is first asked for."""

    def __init__(self, work: Path, minutes: float = math.inf):
        self.work, self.minutes, self._made = work, minutes, {}

    def vae(self):
        from vae_stage import PLAN, train_vae

        return self._once("vae", lambda: train_vae(self.work, self._limited(PLAN)))

    def text(self):
        """-> (tokenizers, CLIP, T5)"""
        from text_stage import PLAN, make_t5, make_tokenizers, train_clip

        def make():
            tokenizers = make_tokenizers(self.work / "tokenizer_2")
            clip = train_clip(self.work, tokenizers[0], self._limited(PLAN))
            return tokenizers, clip, make_t5(tokenizers[1], T5_SEED)

        return self._once("text", make)

    def embed(self, captions: list[str]):
        """-> (T5 states, pooled)"""
        from text_stage import TEXT_LENGTH, encode

        return encode(captions, *self.text(), TEXT_LENGTH)

    def transformer(self):
        import torch
        from flow_stage import PLAN, SPEC, start_at_zero, train_transformer
        from make_nano import make_transformer

        def make():
            torch.manual_seed(TRANSFORMER_SEED)
            transformer = make_transformer(SPEC)
            start_at_zero(transformer)
            plan = self._limited(PLAN)
            return train_transformer(self.work, transformer, self.vae(), self.embed, plan)

        return self._once("transformer", make)

    def judge(self):
        from judge import PLAN, train_judge

        return self._once("judge", lambda: train_judge(self.work, self.vae(), self._limited(PLAN)))

    def export(self, out: Path) -> None:
        """Write the finished folder, read it back, sample from it and have it judged."""
        from export import write_folder
        from sample import judge_samples

        part = out.with_name(out.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        tokenizers, clip, t5 = self.text()
        parts = {"transformer": self.transformer(), "vae": self.vae()}
        parts |= {"text_encoder": clip, "text_encoder_2": t5}
        write_folder(part, tokenizers, parts, self.judge())
        shares = judge_samples(part, SAMPLES, SAMPLE_SEED)
        (part / "judge.json").write_text(json.dumps(shares, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        part.rename(out)
        print(f"wrote {out}: {SAMPLES} pictures judged, shares right: {shares}", flush=True)

    def _limited(self, plan):
        return replace(plan, minutes=min(plan.minutes, self.minutes))

    def _once(self, name: str, make):
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


if __name__ == "__main__":
    main()
