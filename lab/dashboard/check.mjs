// Holds a dashboard against the types that Grafana publishes of its own documents: the whole of it, and each panel's options and style against those of its
// kind of panel. Prints what does not fit, with the panel's title, and ends with 1 if anything does not.
//
//   node check.mjs DASHBOARD.json

import { execFileSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";

const dashboard = JSON.parse(readFileSync(process.argv[2], "utf8"));
const panels = dashboard.panels.filter((panel) => panel.type !== "row");

// What each line of the program is about.
const lines = [["", `import type { Dashboard } from "@grafana/schema";`]];
for (const kind of new Set(panels.map((panel) => panel.type))) {
  const types = `./node_modules/@grafana/schema/dist/types/raw/composable/${kind}/panelcfg/x/types.gen`;
  lines.push([`panels of the kind ${kind}`, `import type * as ${kind} from "${types}";`]);
}
// In a document the words of an enumeration are text.
lines.push(["", "type Json<T> = T extends string ? `${T}` : T extends object ? { [K in keyof T]: Json<T[K]> } : T;"]);
lines.push(["the dashboard", `export const dashboard: Json<Dashboard> = ${JSON.stringify(dashboard)};`]);
panels.forEach((panel, number) => {
  // Grafana fills in what options lack, one by one.
  lines.push([panel.title, `export const options${number}: Json<Partial<${panel.type}.Options>> = ${JSON.stringify(panel.options)};`]);
  const style = panel.fieldConfig.defaults.custom;
  if (style) lines.push([panel.title, `export const style${number}: Json<${panel.type}.FieldConfig> = ${JSON.stringify(style)};`]);
});
writeFileSync("dashboard.ts", lines.map(([, line]) => line).join("\n"));

const options = ["--noEmit", "--strict", "--skipLibCheck", "--module", "esnext", "--moduleResolution", "bundler", "--pretty", "false"];
try {
  execFileSync(process.execPath, ["node_modules/typescript/bin/tsc", ...options, "dashboard.ts"], { encoding: "utf8" });
} catch (failure) {
  if (!failure.stdout) throw failure;
  console.error(failure.stdout.replace(/^dashboard\.ts\((\d+),\d+\)/gm, (_, line) => lines[line - 1][0]));
  process.exit(1);
}
console.log(`dashboard: ${panels.length} panels are as Grafana ${JSON.parse(readFileSync("node_modules/@grafana/schema/package.json", "utf8")).version} has them`);
