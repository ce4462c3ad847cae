// The button "Images and captions" of Load AC-LoRA Dataset: a panel with all images of the folder, whose captions can be edited.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const BUTTON = "Images and captions";
const PER_PAGE = 24;
const INPUTS = ["resolution", "trigger_word", "caption_lines"]; // what decides how an image is learned
const STYLE = `
.aclora-browser { width: min(1180px, 94vw); height: min(900px, 92vh); padding: 0; border: 1px solid var(--border-color); border-radius: 10px;
  background: var(--comfy-menu-bg); color: var(--input-text); font: 14px/1.45 Inter, Arial, sans-serif; }
.aclora-browser::backdrop { background: rgba(0, 0, 0, 0.55); }
.aclora-browser form { display: flex; flex-direction: column; height: 100%; }
.aclora-browser header, .aclora-browser footer { display: flex; align-items: center; gap: 10px; padding: 12px 16px; flex: none; }
.aclora-browser header { border-bottom: 1px solid var(--border-color); }
.aclora-browser footer { border-top: 1px solid var(--border-color); }
.aclora-browser h2 { margin: 0; font-size: 16px; font-weight: 600; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.aclora-browser .space { flex: 1; }
.aclora-browser main { flex: 1; overflow-y: auto; padding: 14px 16px; display: grid; gap: 12px; align-content: start;
  grid-template-columns: repeat(auto-fill, minmax(min(480px, 100%), 1fr)); }
.aclora-browser main:focus { outline: none; }
.aclora-browser .all { grid-column: 1 / -1; margin: 0; }
.aclora-browser ul.all { padding-left: 20px; }
.aclora-browser article { display: grid; grid-template-columns: 168px 1fr; gap: 12px; padding: 10px; border-radius: 8px; background: color-mix(in srgb, var(--input-text) 7%, transparent); min-width: 0; }
.aclora-browser .image { width: 168px; height: 168px; display: grid; place-items: center; background: rgba(128, 128, 128, 0.15); border-radius: 6px; overflow: hidden; }
.aclora-browser img { max-width: 100%; max-height: 100%; display: block; }
.aclora-browser .text { display: flex; flex-direction: column; gap: 6px; min-width: 0; }
.aclora-browser .name { font-weight: 600; overflow-wrap: anywhere; }
.aclora-browser .facts { color: var(--descrip-text); font-size: 13px; }
.aclora-browser .remark { color: color-mix(in srgb, #d97706 70%, var(--input-text)); }
.aclora-browser .problem { color: var(--error-text); }
.aclora-browser textarea { flex: 1; min-height: 64px; resize: vertical; padding: 6px 8px; border: 1px solid var(--border-color); border-radius: 6px;
  background: var(--comfy-menu-bg); color: var(--input-text); font: inherit; }
.aclora-browser textarea:read-only { background: none; border-color: transparent; padding-left: 0; resize: none; }
.aclora-browser textarea:focus-visible { outline: 2px solid var(--p-primary-color, #0b8ce9); outline-offset: -1px; }
.aclora-browser .row { display: flex; align-items: center; gap: 8px; min-height: 30px; }
.aclora-browser .row .facts { flex: 1; }
.aclora-browser button, .aclora-browser select { padding: 5px 12px; border: 1px solid var(--border-color); border-radius: 6px; background: var(--comfy-menu-bg);
  color: var(--input-text); font: inherit; cursor: pointer; white-space: nowrap; }
.aclora-browser button:hover:enabled { background: color-mix(in srgb, var(--input-text) 14%, var(--comfy-menu-bg)); }
.aclora-browser button:disabled { opacity: 0.45; cursor: default; }
.aclora-browser .close { border: none; background: none; font-size: 18px; line-height: 1; padding: 4px 8px; }`;

function element(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

/** Asks a route of the pack. Throws an Error with the server's sentence. */
async function ask(path, options) {
  let answer;
  try {
    answer = await api.fetchApi(path, options);
  } catch {
    throw new Error("ComfyUI does not answer. Is it still running?");
  }
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(found.error ?? `ComfyUI answers with the error ${answer.status}.`);
  return found;
}

const value = (node, name) => node.widgets?.find((widget) => widget.name === name)?.value;

/** One image with its caption. */
class Card {
  constructor(panel, facts) {
    this.panel = panel;
    this.facts = facts;
    this.state = element("span", { className: "facts" });
    this.area = element("textarea", { spellcheck: true, readOnly: Boolean(panel.readOnly), value: facts.text });
    this.area.setAttribute("aria-label", `Caption of ${facts.name}`);
    this.area.addEventListener("input", () => this.onInput());
    this.button = element("button", { type: "button", textContent: "Save", hidden: true, onclick: () => this.save() });
    this.about = element("div");
    const image = element("div", { className: "image" });
    if (facts.changed) image.append(element("img", { loading: "lazy", alt: facts.name, src: this.thumbnail() }));
    const row = element("div", { className: "row" }, this.state, this.button);
    this.element = element("article", {}, image, element("div", { className: "text" }, this.about, this.area, row));
    this.show();
    this.restore();
  }

  thumbnail() {
    const query = new URLSearchParams({ ...this.panel.settings(), image: this.facts.name, changed: this.facts.changed });
    return api.apiURL(`/aclora/dataset/thumbnail?${query}`);
  }

  /** Shows what is known of the image. */
  show() {
    const { name, size, learned_size, remarks, problem, learned_as } = this.facts;
    const sizes = size ? `${size.join(" × ")} pixels${learned_size ? `, learned at ${learned_size.join(" × ")}` : ""}` : "";
    this.about.replaceChildren(element("div", { className: "name", textContent: name }), element("div", { className: "facts", textContent: sizes }));
    if (remarks.length) this.about.append(element("div", { className: "facts remark", textContent: remarks.join(" · ") }));
    if (problem) this.about.append(element("div", { className: "facts problem", textContent: problem }));
    this.area.placeholder = problem ? "" : learned_as?.[0] ? `No caption: learned as “${learned_as[0]}”` : "No caption";
    this.state.textContent = "";
  }

  get isChanged() {
    return this.area.value !== this.facts.text;
  }

  /** Brings back what was typed before the page was turned. */
  restore() {
    const typed = this.panel.typed.get(this.facts.name);
    if (typed === undefined) return;
    this.area.value = typed;
    this.onInput();
  }

  onInput() {
    this.button.hidden = !this.isChanged;
    if (this.isChanged) this.panel.typed.set(this.facts.name, this.area.value);
    else this.panel.typed.delete(this.facts.name);
    this.panel.showUnsaved();
  }

  async save() {
    this.button.disabled = true;
    const saved = await this.panel.save(this.facts, this.area.value).catch((error) => error);
    this.button.disabled = false;
    if (saved instanceof Error) {
      this.state.textContent = saved.message;
      this.state.className = "facts problem";
      return;
    }
    this.facts = saved;
    this.state.className = "facts";
    this.show();
    this.state.textContent = `Saved in ${saved.file}`;
    this.onInput();
  }
}

class Panel {
  constructor(node) {
    this.node = node;
    this.folder = value(node, "folder");
    this.page = 0;
    this.typed = new Map(); // texts that are not saved, by the image's name
    this.cards = [];
    this.title = element("h2");
    this.main = element("main", { tabIndex: 0, autofocus: true });
    this.unsaved = element("span", { className: "facts" });
    this.place = element("span", { className: "facts" });
    const button = (textContent, onclick) => element("button", { type: "button", textContent, onclick });
    this.back = button("Previous", () => this.turn(-1));
    this.next = button("Next", () => this.turn(1));
    this.saveAll = button("Save all", () => this.saveTyped());
    this.discard = button("Discard", () => this.close());
    const close = element("button", { type: "button", className: "close", textContent: "✕", onclick: () => this.leave() });
    close.setAttribute("aria-label", "Close");
    const header = element("header", {}, this.title, element("span", { className: "space" }), ...this.choice(), button("Reload", () => this.load()), close);
    const footer = element("footer", {}, this.back, this.place, this.next, element("span", { className: "space" }), this.unsaved, this.discard, this.saveAll);
    const form = element("form", { method: "dialog", onsubmit: (event) => event.preventDefault() }, header, this.main, footer);
    this.dialog = element("dialog", { className: "aclora-browser" }, element("style", { textContent: STYLE }), form);
    this.dialog.setAttribute("aria-label", BUTTON);
    this.dialog.addEventListener("close", () => this.onClose());
    // ComfyUI's shortcuts and its paste are for the graph.
    for (const kind of ["keydown", "keyup", "paste", "copy", "cut"]) this.dialog.addEventListener(kind, (event) => event.stopPropagation());
    this.onKey = this.onKey.bind(this);
  }

  /** Leaves at Escape wherever the focus is; the browser would close the dialog whatever is not saved. */
  onKey(event) {
    const isEscape = event.key === "Escape" && !event.isComposing;
    if (isEscape || !this.dialog.contains(event.target)) event.stopPropagation();
    if (!isEscape) return;
    event.preventDefault();
    this.leave();
  }

  /** The choice between the style's folder and that of the regularisation images, where there is one. */
  choice() {
    const other = value(this.node, "regularisation");
    if (!other || other === "none") return [];
    const options = [this.folder, other].map((folder) => element("option", { value: folder, textContent: folder }));
    return [element("select", { onchange: (event) => this.changeFolder(event.target) }, ...options)];
  }

  changeFolder(select) {
    if (this.typed.size) {
      select.value = this.folder;
      this.askToSave();
      return;
    }
    this.folder = select.value;
    this.page = 0;
    this.load();
  }

  settings() {
    const found = Object.fromEntries(INPUTS.map((name) => [name, value(this.node, name) ?? ""]));
    if (this.folder !== value(this.node, "folder")) found.trigger_word = ""; // regularisation images get none
    return { ...found, folder: this.folder };
  }

  open() {
    document.body.append(this.dialog);
    window.addEventListener("keydown", this.onKey, true);
    this.dialog.showModal();
    return this.load();
  }

  async load() {
    this.title.textContent = this.folder;
    try {
      const found = await ask(`/aclora/dataset?${new URLSearchParams(this.settings())}`);
      this.images = found.images;
      this.remarks = found.remarks;
      this.readOnly = found.read_only;
    } catch (error) {
      this.images = [];
      this.remarks = [error.message];
      this.readOnly = "";
    }
    this.show();
  }

  show() {
    const pages = Math.max(1, Math.ceil(this.images.length / PER_PAGE));
    this.page = Math.min(this.page, pages - 1);
    const start = this.page * PER_PAGE;
    const shown = this.images.slice(start, start + PER_PAGE);
    const count = this.images.length;
    this.title.textContent = `${this.folder} · ${count} ${count === 1 ? "image" : "images"}`;
    this.place.textContent = count ? `${start + 1} to ${start + shown.length} of ${count}` : "";
    this.back.disabled = this.page === 0;
    this.next.disabled = this.page === pages - 1;
    this.cards = shown.map((facts) => new Card(this, facts));
    const trigger = this.settings().trigger_word;
    const facts = [this.readOnly, trigger && `The trigger word “${trigger}” is put in front of captions that lack it.`];
    const notes = facts.filter(Boolean).map((textContent) => element("p", { className: "all facts", textContent }));
    const remarks = this.remarks.map((remark) => element("li", { textContent: remark }));
    if (remarks.length) notes.push(element("ul", { className: "all facts remark" }, ...remarks));
    this.main.replaceChildren(...notes, ...this.cards.map((card) => card.element));
    this.main.scrollTop = 0;
    this.showUnsaved();
  }

  turn(pages) {
    this.page += pages;
    this.show();
  }

  showUnsaved() {
    const count = this.typed.size;
    this.saveAll.hidden = !count;
    if (!count) this.discard.hidden = true;
    this.unsaved.textContent = count ? `${count} ${count === 1 ? "caption is" : "captions are"} not saved` : "";
    this.unsaved.className = "facts";
  }

  /** Saves one caption, and returns the new facts of its image. */
  async save(facts, text) {
    const sent = { ...this.settings(), image: facts.name, text, version: facts.version };
    const saved = await ask("/aclora/dataset/caption", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(sent) });
    this.typed.delete(facts.name);
    // Images whose names differ in the suffix alone share the file.
    for (const each of this.images) if (each.file && each.file === facts.file && each.name !== facts.name) Object.assign(each, { text: saved.text, version: saved.version });
    this.images[this.images.findIndex((each) => each.name === saved.name)] = saved;
    return saved;
  }

  async saveTyped() {
    for (const [name, text] of [...this.typed]) {
      const card = this.cards.find((each) => each.facts.name === name);
      if (card) {
        await card.save();
        continue;
      }
      try {
        await this.save(this.images.find((each) => each.name === name), text);
      } catch (error) {
        this.showUnsaved();
        this.unsaved.textContent = error.message;
        this.unsaved.className = "facts problem";
        return;
      }
    }
    this.showUnsaved();
  }

  leave() {
    if (this.typed.size) this.askToSave();
    else this.close();
  }

  askToSave() {
    this.showUnsaved();
    this.unsaved.className = "facts problem";
    this.discard.hidden = false;
    this.saveAll.focus();
  }

  close() {
    this.dialog.close();
  }

  onClose() {
    window.removeEventListener("keydown", this.onKey, true);
    this.dialog.remove();
  }
}

app.registerExtension({
  name: "AC-LoRA.dataset-browser",
  nodeCreated(node) {
    if (node.comfyClass !== "ACLoRADataset") return;
    const button = node.addWidget("button", BUTTON, null, () => new Panel(node).open(), { serialize: false });
    button.serialize = false; // saved workflows keep values by position
    const first = node.widgets.findIndex((widget) => widget.type === "button");
    node.widgets.splice(first, 0, node.widgets.pop()); // before the button that shows the advanced inputs
    button.tooltip = "All images of the folder, with their captions, sizes and remarks. Captions can be edited.";
  },
});
