"""Saving and loading LoRAs through a running server, as the front end does."""

import asyncio
import json
from urllib.error import HTTPError

import pytest
import torch
from safetensors.torch import save_file

BASE = "diffusion_model.joint_blocks.0.x_block.attn.qkv"


@pytest.fixture
def lora(server):
    """A LoRA file of another program in models/loras."""
    state = {f"{BASE}.lora_B.weight": torch.ones(6, 2), f"{BASE}.lora_A.weight": torch.ones(2, 4)}
    save_file(state, server.base / "models" / "loras" / "foreign.safetensors")
    return "foreign.safetensors"


def load_node(name, **inputs):
    strengths = {"strength_model": 1.0, "strength_clip": 1.0}
    return {"class_type": "ACLoRALoad", "inputs": {"lora_name": name, **strengths, **inputs}}


def save_node(filename, source, **inputs):
    settings = {"precision": "fp16", "overwrite": False, **inputs}
    return {"class_type": "ACLoRASave", "inputs": {"lora_model": source, "filename": filename, **settings}}


def preview(source):
    return {"class_type": "PreviewAny", "inputs": {"source": source}}


def test_a_file_is_loaded_saved_and_reloaded_by_its_linked_name(server, lora):
    prompt = {
        "1": load_node(lora),
        "2": save_node("copies/again", ["1", 2], trigger="tusche"),
        "3": load_node(["2", 0]),
        "4": preview(["3", 3]),
    }
    history = server.run(prompt)
    table = history["outputs"]["4"]["text"][0]
    assert "1 LoRA layer, rank 2, float16" in table and "tusche" in table
    assert "copies/again_00001.safetensors" in history["outputs"]["2"]["text"][0]
    assert (server.base / "models" / "loras" / "copies" / "again_00001.safetensors").is_file()


def test_all_loaders_list_the_new_file_and_its_metadata_is_served(server, lora):
    server.run({"1": load_node(lora), "2": save_node("listed", ["1", 2], overwrite=True, trigger="tusche")})
    info = server.get_json("/object_info")
    assert "listed.safetensors" in info["LoraLoader"]["input"]["required"]["lora_name"][0]
    assert "listed.safetensors" in info["ACLoRALoad"]["input"]["required"]["lora_name"][1]["options"]
    metadata = server.get_json("/view_metadata/loras?filename=listed.safetensors")
    assert metadata["modelspec.trigger_phrase"] == "tusche" and len(metadata["sshs_model_hash"]) == 64


@pytest.mark.parametrize(
    ("prompt", "node", "sentence"),
    [
        ({"1": load_node("foreign.safetensors"), "2": save_node("../x", ["1", 2])}, "2", "leads outside models/loras"),
        ({"1": load_node("gone.safetensors"), "2": preview(["1", 3])}, "1", "no LoRA file 'gone.safetensors'"),
    ],
)
def test_bad_input_is_refused_on_its_node_when_queued(server, lora, prompt, node, sentence):
    with pytest.raises(HTTPError) as refusal:
        server.post_json("/prompt", {"prompt": prompt})
    errors = json.loads(refusal.value.read())["node_errors"]
    assert errors.keys() == {node}
    assert sentence in errors[node]["errors"][0]["details"]


async def messages(server, prompt):
    """Return the messages to the front end while a prompt runs: events by type, and the texts shown on nodes."""
    import aiohttp  # comes with ComfyUI; without it these tests are skipped

    events, texts = {}, {}
    address = server.server.address
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{address}/ws?clientId=me") as socket:
        await session.post(f"{address}/prompt", json={"prompt": prompt, "client_id": "me"})
        async for message in socket:
            if message.type == aiohttp.WSMsgType.BINARY:
                length = int.from_bytes(message.data[4:8], "big")  # after the event number
                texts[message.data[8 : 8 + length].decode()] = message.data[8 + length :].decode()
                continue
            event = json.loads(message.data)
            events[event["type"]] = event["data"]
            if event["type"] in ("execution_success", "execution_interrupted"):
                return events, texts
    raise AssertionError("the server closed the connection")


def test_the_node_shows_the_saved_file(server, lora):
    prompt = {"1": load_node(lora), "2": save_node("shown", ["1", 2])}
    _, texts = asyncio.run(asyncio.wait_for(messages(server, prompt), 60))
    assert "Saved shown_00001.safetensors: " in texts["2"]


def test_an_output_without_its_input_fails_where_it_is_used(server, lora):
    prompt = {"1": load_node(lora), "2": preview(["1", 0]), "3": preview(["1", 3])}
    events, _ = asyncio.run(asyncio.wait_for(messages(server, prompt), 60))
    assert events["execution_error"]["node_id"] == "2"
    assert "outputs a model only if one is connected" in events["execution_error"]["exception_message"]


def test_a_changed_file_is_reloaded_by_the_same_workflow(server, lora):
    prompt = {"1": load_node("changing.safetensors"), "2": preview(["1", 3])}
    tables = []
    for rank in (1, 2):
        state = {f"{BASE}.lora_B.weight": torch.ones(6, rank), f"{BASE}.lora_A.weight": torch.ones(rank, 4)}
        save_file(state, server.base / "models" / "loras" / "changing.safetensors")
        tables.append(server.run(prompt)["outputs"]["2"]["text"][0])
    assert "rank 1," in tables[0] and "rank 2," in tables[1]
