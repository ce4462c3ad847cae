"""Scripts for a page of ComfyUI's front end, for tests and screenshots."""

NEWER = "Comfy.VueNodes.Enabled"  # the setting of Nodes 2.0
# Changes a setting: [name, value].
SET = "([name, value]) => window.app.extensionManager.setting.set(name, value)"
# Opens a workflow as the template browser does: [workflow, name].
OPEN = "([workflow, name]) => window.app.loadGraphData(workflow, true, true, name, {openSource: 'template'})"
# Queues the open workflow. Then window.ended is 1 once it has ended or failed, and 2 once the server is idle.
RUN = """() => {
  window.ended = 0;
  const end = () => { window.ended = 1; }, idle = ({detail}) => { if (window.ended && !detail) window.ended = 2; };
  for (const kind of ["execution_success", "execution_error"]) window.app.api.addEventListener(kind, end);
  window.app.api.addEventListener("executing", idle);
  window.app.queuePrompt(0);
}"""
# Resolves once no node has moved or changed its size for half a second, or after ten seconds.
STILL = """async () => {
  const places = () => JSON.stringify([
    window.app.graph.nodes.map(node => [...node.getBounding()]),
    [...document.querySelectorAll('[data-node-id]')].map(element => element.getBoundingClientRect()),
  ]);
  const began = performance.now();
  let last = places(), since = began;
  while (performance.now() - since < 500 && performance.now() - began < 10000) {
    await new Promise(requestAnimationFrame);
    const now = places();
    if (now !== last) [last, since] = [now, performance.now()];
  }
}"""
