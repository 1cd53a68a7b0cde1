"""Folders of config with a platform that has stages: what a user could have written."""

from __future__ import annotations

from pathlib import Path

TWO = """\
# @package _global_
# The first layer on our kernels, the rest on torch.
defaults:
  - override /executor: pipeline

stages:
  - [platform=cpu, "model.layers=[0,1]"]
  - - platform=cpu
    - ops=torch
    - attention=sdpa
    - model.layers=[1,null]

platform:
  name: two
  level: declared
"""
LINES = {"stages.0": 7, "stages.1.ops": 9, "stages.1.attention": 10, "stages.1.model.layers": 11}


def config_dir(folder: Path, text: str = TWO, name: str = "two") -> str:
    file = folder / "platform" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return str(folder)
