// Two buttons on Train AC-LoRA, for the training that runs: previews of the current step, and its LoRA as a file.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const BUTTONS = {
  sample: ["Sample now", "While it trains: draws the prompts of AC-LoRA Preview Options after the current step."],
  save: ["Save now", "While it trains: saves the LoRA of the current step into models/loras/aclora."],
};

function say(severity, detail) {
  app.extensionManager.toast.add({ severity, summary: "AC-LoRA", detail, life: 10_000 });
}

async function ask(kind, node) {
  try {
    const body = JSON.stringify({ node: String(node.id) });
    const response = await api.fetchApi(`/aclora/training/${kind}`, { method: "POST", body });
    say(response.ok ? "info" : "warn", (await response.json()).message);
  } catch {
    say("error", "ComfyUI gave no answer. Look whether it is still running.");
  }
}

app.registerExtension({
  name: "AC-LoRA.training-buttons",
  nodeCreated(node) {
    if (node.comfyClass !== "ACLoRATrain") return;
    for (const [kind, [label, tooltip]] of Object.entries(BUTTONS)) {
      const button = node.addWidget("button", label, null, () => ask(kind, node), { serialize: false });
      button.tooltip = tooltip;
      button.serialize = false; // a saved workflow keeps the widgets' values by position
    }
  },
});
