// Says why AC-LoRA's nodes are missing, where they are: ComfyUI loads this file also when it could not load the nodes.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const MINIMUM = "0.24.0"; // as in nodes/compatibility/load.py
const numbers = (version) => version.match(/\d+/g)?.slice(0, 3).map(Number) ?? [0];

function isOlder(version, than) {
  const [found, wanted] = [numbers(version), numbers(than)];
  const place = wanted.findIndex((number, index) => number !== (found[index] ?? 0));
  return place >= 0 && (found[place] ?? 0) < wanted[place];
}

async function reason() {
  const version = (await (await api.fetchApi("/system_stats")).json()).system?.comfyui_version ?? "0";
  if (isOlder(version, MINIMUM))
    return `AC-LoRA needs ComfyUI ${MINIMUM} or newer, and this is ${version}: its nodes and templates are not loaded. Update ComfyUI and start it again.`;
  return "AC-LoRA's nodes and templates are not loaded. ComfyUI's console says why, in the line that begins with “Error while calling comfy_entrypoint”.";
}

let missing = false;

app.registerExtension({
  name: "AC-LoRA.missing-nodes",
  addCustomNodeDefs(definitions) {
    missing = !("ACLoRATrain" in definitions);
  },
  async setup() {
    if (missing) app.extensionManager.toast.add({ severity: "error", summary: "AC-LoRA", detail: await reason() });
  },
});
