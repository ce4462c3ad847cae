// Opens the workflows of AC-LoRA as large as the window allows. The front end fits them into three quarters of it, and below a
// scale of 0.57 it draws nodes without text.
import { app } from "../../scripts/app.js";

const READABLE = 0.6, NATURAL = 1; // the smallest and the largest scale; where the smallest is too large, the beginning is shown
const MARGIN = 12; // pixels around the workflow
const TITLE = 30; // height of a node's title, which lies above its position
const BARS = 94; // height of the front end's bars at the top; a message about the last workflow may hang below them for a moment
const RESTORE = "Comfy.EnableWorkflowViewRestore"; // without it a workflow leaves the view as it is

let isNew = false; // whether the workflow that is being opened comes as it ships, without a view that someone left it in

/** Returns the box of all nodes and groups: left, top, right, bottom. */
function boxOf(graph) {
  const nodes = graph.nodes.map(({ pos, size }) => [pos[0], pos[1] - TITLE, pos[0] + size[0], pos[1] + size[1]]);
  const groups = graph.groups.map(({ pos, size }) => [pos[0], pos[1], pos[0] + size[0], pos[1] + size[1]]);
  const boxes = [...nodes, ...groups];
  return [0, 1, 2, 3].map((side) => Math[side < 2 ? "min" : "max"](...boxes.map((box) => box[side])));
}

/** Returns the part of the canvas that no bar covers, in the canvas's pixels. */
function freeArea(canvas) {
  const whole = canvas.getBoundingClientRect();
  const area = document.querySelector(".graph-canvas-panel")?.getBoundingClientRect() ?? whole;
  const top = Math.min(area.top, whole.top + BARS);
  return { x: area.x - whole.x + MARGIN, y: top - whole.y + MARGIN, width: area.width - 2 * MARGIN, height: area.bottom - top - 2 * MARGIN };
}

function fillWindow() {
  const [left, top, right, bottom] = boxOf(app.graph);
  const area = freeArea(app.canvas.canvas);
  const fitting = Math.min(area.width / (right - left), area.height / (bottom - top));
  const scale = Math.min(NATURAL, Math.max(READABLE, fitting));
  const spare = (room, length) => Math.max(0, room / scale - length) / 2; // centred, or from the start where it does not fit
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [area.x / scale - left + spare(area.width, right - left), area.y / scale - top + spare(area.height, bottom - top)];
  app.canvas.setDirty(true, true);
}

app.registerExtension({
  name: "AC-LoRA.opening-view",
  beforeConfigureGraph(workflow) {
    isNew = Boolean(workflow.extra?.aclora_template) && !workflow.extra.ds;
  },
  afterConfigureGraph() {
    if (!isNew || !app.extensionManager.setting.get(RESTORE)) return;
    isNew = false;
    const { width, height } = app.canvas.canvas;
    if (width && height) fillWindow();
    else requestAnimationFrame(() => requestAnimationFrame(fillWindow)); // after the front end's own, once there is a window
  },
});
