// What nodes of AC-LoRA say: errors until the next run, results also after a change of tab and a reload, all of it in
// full. And Train AC-LoRA is large enough to read its chart.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const TRAIN = "ACLoRATrain";
const TRAIN_SIZE = [420, 860]; // of a new node; a saved workflow keeps its own
const NO_ID = "00000000-0000-0000-0000-000000000000"; // of graphs that came without one
const RUNS = 8; // looked at in the server's history; each brings its whole workflow
const TEXT_WIDGET = "$$node-text-preview"; // the front end's, for the text of a running node
const LETTER = 6.6, LINE = 16, MARGINS = [60, 34]; // pixels of a text on a node, about
const TEXT_HEIGHT = 150; // at most, so that the picture gets the rest
const ERROR_SIGN = "⚠"; // as in nodes/host/told_errors.py

const textWidget = (node) => node.widgets?.find((each) => each.name === TEXT_WIDGET);

// Makes room for the whole text; the front end leaves two lines.
function fitText(node) {
  const widget = textWidget(node);
  if (!widget?.options) return;
  const columns = Math.max(20, (node.size[0] - MARGINS[0]) / LETTER);
  const lines = String(widget.value).split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / columns)), 0);
  const height = Math.min(TEXT_HEIGHT, lines * LINE + MARGINS[1]);
  widget.options.getMinHeight = () => height;
  widget.options.getMaxHeight = () => Math.max(height, 58);
  const needed = node.computeSize()[1];
  if (node.size[1] < needed) node.setSize([node.size[0], needed]);
}

// In Nodes 2.0 the widgets of a node take half of its height as soon as there is a text: the picture gets that room. And
// the lines of a text run together, as it is Markdown there.
const MARKED = "data-aclora";
const style = document.createElement("style");
style.textContent = `[${MARKED}] .lg-node-widgets { flex: 0 0 auto !important; }
[${MARKED}] .comfy-markdown-content p { white-space: pre-line; }`;
document.head.append(style);

function leaveRoom(node, tries = 60) {
  const element = document.querySelector(`[data-node-id="${node.id}"]`);
  if (element) element.setAttribute(MARKED, "");
  else if (tries && window.LiteGraph?.vueNodesMode) requestAnimationFrame(() => leaveRoom(node, tries - 1));
}

// The front end keeps the images of a node and forgets its text, which the server sends both ways.
function showText(id, output) {
  const text = (output?.headline ?? output?.text)?.join?.("\n"); // the picture of a training has the other sentences
  if (text) api.dispatchCustomEvent("progress_text", { nodeId: String(id), text: text.replaceAll("[[", "[ [") });
}

// There is no public way to drop the last live image, which would stay beside the picture of the result.
function dropLiveImage(node) {
  const pinia = document.querySelector("#vue-app")?.__vue_app__?.config.globalProperties.$pinia;
  const inSubgraph = node.graph && node.graph !== app.graph;
  pinia?._s?.get("nodeOutput")?.revokePreviewsByLocatorId?.(inSubgraph ? `${node.graph.id}:${node.id}` : `${node.id}`);
}

// Of several images nodes show small ones side by side: the first comes large, with "1/2" or dots to go on.
function showFirst(node, output, tries = 120) {
  const count = output?.images?.length ?? 0;
  if (count < 2 || !tries || node.shownFirst === output.images[0].filename) return;
  if (enlargeFirst(node, count)) node.shownFirst = output.images[0].filename; // once: whoever looks at all of them may
  else requestAnimationFrame(() => showFirst(node, output, tries - 1));
}

function giveBack(focused) {
  document.activeElement?.blur?.();
  focused?.focus?.({ preventScroll: true });
}

function enlargeFirst(node, count) {
  if (window.LiteGraph?.vueNodesMode) {
    const small = document.querySelectorAll(`[data-node-id="${node.id}"] [data-testid="image-grid"] button`);
    if (small.length !== count) return false;
    const focused = document.activeElement;
    small[0].click();
    setTimeout(() => giveBack(focused)); // the image takes the focus, from someone who may be typing
    return true;
  }
  if (node.imgs?.length !== count) return false;
  node.imageIndex ??= 0;
  return true;
}

const isOurs = (node) => node?.comfyClass?.startsWith("ACLoRA");
const asked = new Set(); // ids of workflows whose results were looked for

// After a reload of the page the front end knows no results; the server knows those of its last runs.
async function restoreResults() {
  const workflow = app.graph?.id;
  const blank = app.graph?.nodes.filter((node) => isOurs(node) && !app.nodeOutputs?.[node.id]) ?? [];
  if (!workflow || workflow === NO_ID || !blank.length || asked.has(workflow)) return;
  asked.add(workflow);
  const history = await (await api.fetchApi(`/history?max_items=${RUNS}`)).json();
  for (const { prompt, outputs } of Object.values(history)) {
    if (prompt?.[3]?.extra_pnginfo?.workflow?.id !== workflow) continue;
    for (const { id } of blank)
      if (outputs?.[id])
        api.dispatchCustomEvent("executed", { node: `${id}`, display_node: `${id}`, output: outputs[id], prompt_id: prompt[1] });
  }
}

app.registerExtension({
  name: "AC-LoRA.node-results",
  setup() {
    api.addEventListener("progress_text", ({ detail }) => {
      const node = app.graph?.getNodeById(detail.nodeId);
      if (!isOurs(node)) return;
      fitText(node);
      leaveRoom(node);
    });
    api.addEventListener("execution_start", () => {
      for (const node of app.graph?.nodes ?? [])
        if (isOurs(node) && String(textWidget(node)?.value).startsWith(ERROR_SIGN)) node.removeWidget(textWidget(node));
    });
  },
  afterConfigureGraph() {
    for (const element of document.querySelectorAll(`[${MARKED}]`)) element.removeAttribute(MARKED);
    setTimeout(() => restoreResults().catch((error) => console.warn("AC-LoRA:", error)), 500); // once the graph is shown
  },
  nodeCreated(node) {
    if (node.comfyClass !== TRAIN) return;
    node.setSize([Math.max(node.size[0], TRAIN_SIZE[0]), Math.max(node.size[1], TRAIN_SIZE[1])]);
    const onExecuted = node.onExecuted;
    node.onExecuted = function (output) {
      showText(node.id, output);
      if (output?.images?.length) dropLiveImage(node);
      showFirst(node, output);
      return onExecuted?.apply(this, arguments);
    };
  },
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs ?? {})) {
      const node = app.graph?.getNodeById(id);
      if (!isOurs(node)) continue;
      showText(id, output);
      if (node.comfyClass === TRAIN) showFirst(node, output);
    }
  },
});
