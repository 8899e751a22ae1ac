// The nodes' texts in the page's language: their names and tooltips where an older page has lost them, and the messages that they show.
//
// ComfyUI 0.3.75's page merges the packs' translations (locales/) when it opens, and then replaces them by its own when it loads a language.
// Newer pages merge them again by themselves.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { ownNode, textBox } from "./svdquant.js";

const OURS = "SVDQuant"; // the beginning of our nodes' names

function i18n() {
  const vue = document.getElementById("vue-app")?.__vue_app__;
  return vue?._context.provides[vue.__VUE_I18N_SYMBOL__]?.global;
}

async function ownTranslations() {
  const found = {};
  for (const [language, texts] of Object.entries(await (await api.fetchApi("/i18n")).json())) {
    const nodeDefs = Object.fromEntries(Object.entries(texts.nodeDefs ?? {}).filter(([name]) => name.startsWith(OURS)));
    found[language] = { nodeDefs };
  }
  return found;
}

async function keepTranslations() {
  const page = i18n();
  if (!page?.setLocaleMessage) return; // a page of another make, which then shows what it has
  const own = await ownTranslations();
  const merge = (language) => own[language] && page.mergeLocaleMessage(language, own[language]);
  const replace = page.setLocaleMessage;
  page.setLocaleMessage = function (language, texts) {
    replace.call(this, language, texts);
    merge(language);
  };
  Object.keys(own).forEach(merge);
}

// Messages: {"layer {0} of {1}": the same in the language}. What stands for {0} is translated too if it is a message itself.

let messages = []; // [[pattern, translation]]

async function loadMessages(language) {
  const file = await fetch(new URL(`messages/${language}.json`, import.meta.url));
  messages = file.ok ? Object.entries(await file.json()).map(([text, translation]) => [pattern(text), translation]) : [];
}

function pattern(text) {
  const literal = text.split(/\{\d\}/).map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  return new RegExp(`^${literal.join("(.*?)")}$`);
}

function translated(text) {
  for (const [found, translation] of messages) {
    const values = found.exec(text);
    if (values) return translation.replace(/\{(\d)\}/g, (_, number) => translated(values[Number(number) + 1]));
  }
  return text.includes("\n") ? text.split("\n").map(translated).join("\n") : text;
}

// The page's own listener, which may run after this one, puts the text into the box.
function translateProgress({ detail }) {
  queueMicrotask(() => {
    const box = textBox(ownNode(detail.nodeId));
    if (box?.value === detail.text) box.value = translated(detail.text);
  });
}

await keepTranslations();
app.registerExtension({
  name: "SVDQuant.translations",
  async setup() {
    const language = app.extensionManager.setting.get("Comfy.Locale");
    if (language === "en") return;
    await loadMessages(language);
    api.addEventListener("progress_text", translateProgress);
  },
});
