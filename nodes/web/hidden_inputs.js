// Hides the advanced inputs of AC-LoRA's nodes in the classic front end too, behind a button, as Nodes 2.0 does by itself.
import { app } from "../../scripts/app.js";

const SHOW = "Show advanced inputs";
const HIDE = "Hide advanced inputs";
const ALWAYS = "Comfy.Node.AlwaysShowAdvancedWidgets";

const alwaysShown = () => window.LiteGraph.vueNodesMode || app.extensionManager.setting.get(ALWAYS);
const advancedWidgets = (node) => (node.widgets ?? []).filter((widget) => widget.options?.advanced);
const isLinked = (node, widget) => node.inputs?.some((input) => input.widget?.name === widget.name && input.link != null);

function toggle(node) {
  node.showAdvanced = !node.showAdvanced; // also of Nodes 2.0; saved with the workflow
  node.expandToFitContent?.();
  node.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "AC-LoRA.hidden-inputs",
  nodeCreated(node) {
    const widgets = node.comfyClass?.startsWith("ACLoRA") ? advancedWidgets(node) : [];
    if (!widgets.length) return;
    for (const widget of widgets) {
      widget.usual = widget.value;
      const get = () => !alwaysShown() && !node.showAdvanced && !isLinked(node, widget);
      Object.defineProperty(widget, "hidden", { get, set() {}, configurable: true });
    }
    const button = node.addWidget("button", SHOW, null, () => toggle(node), { serialize: false, canvasOnly: true });
    button.serialize = false; // saved workflows keep values by position
    Object.defineProperty(button, "label", { get: () => (node.showAdvanced ? HIDE : SHOW), set() {}, configurable: true });
    Object.defineProperty(button, "hidden", { get: alwaysShown, set() {}, configurable: true });
    node.setSize([node.size[0], node.computeSize()[1]]);
  },
  /** A workflow that changes an advanced input shows it. */
  loadedGraphNode(node) {
    const isChanged = advancedWidgets(node).some((widget) => "usual" in widget && widget.value !== widget.usual);
    if (isChanged && !node.showAdvanced) toggle(node);
  },
});
