"""ComfyUI without a server, with a stand-in for ComfyUI whose `main` needs what the real one needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from launcher.environment import ROOT

COMFYUI = {
    "comfy/options.py": "args_parsing = False\ndef enable_args_parsing(): global args_parsing; args_parsing = True",
    "comfy/cli_args.py": "import sys, types, comfy.options\n"
    "args = types.SimpleNamespace(words=sys.argv[1:], port=1, parsed=comfy.options.args_parsing)",
    "cuda_malloc.py": "blacklist = {'an old card'}",
    "main.py": "from comfy.cli_args import args\nimport types\n"
    "def start_comfyui():\n"
    "    assert cuda_malloc.blacklist  # as where the allocator is that of ComfyUI's server\n"
    "    return None, types.SimpleNamespace(send_sync=None), None",
    "nodes.py": "",
    "folder_paths.py": "",
    "execution.py": "import enum\n"
    "class CacheType(enum.Enum):\n    CLASSIC = 0\n"
    "class PromptExecutor:\n"
    "    history_result = {'outputs': {'1': {'text': ('done',)}}}\n"
    "    def __init__(self, server, cache_type, cache_args): self.server = server\n"
    "    def execute(self, prompt, prompt_id, extra, wanted):\n"
    "        self.server.send_sync('first', {}, None)\n"
    "        self.server.send_sync('second', {}, None)",
}
PROGRAM = """
import json, sys
sys.path[0] = sys.argv[1]
from pathlib import Path
from workers.headless import Headless
comfy = Headless(Path(sys.argv[2]), ["--cpu"], {"port": 2})
seen = []
outputs = comfy.run({}, ["1"], lambda kind, data, run: seen.append(kind))
def fail(kind, data, run):
    seen.append(kind)
    raise ValueError(f"no {kind}")
try:
    comfy.run({}, ["1"], fail)
except ValueError as error:
    seen.append(str(error))
from comfy.cli_args import args
print(json.dumps([vars(args), outputs, seen]))
"""


def test_comfyui_runs_prompts_with_changed_arguments(tmp_path: Path) -> None:
    for name, text in COMFYUI.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, str(program), str(ROOT), str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    arguments, outputs, seen = json.loads(run.stdout)
    assert arguments == {"words": ["--cpu"], "port": 2, "parsed": True}
    assert outputs == {"1": {"text": ["done"]}}
    assert seen == ["first", "second", "first", "second", "no first"]  # the first error, after all was told
