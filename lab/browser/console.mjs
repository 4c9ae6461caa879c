// Drives the console in a real Chromium as an operator would: by keyboard, on a narrow screen, in light and dark, with entries that hold markup.
// CONSOLE_URL and CONSOLE_TOKEN name the daemon's; CHROMIUM the browser; SHOTS, where it is set, the folder for pictures. Ends with 1 if anything is not as it
// should be.

import { chromium } from "playwright-core";
import { strict as assert } from "node:assert";

const { CONSOLE_URL: url, CONSOLE_TOKEN: token, CHROMIUM: executablePath, SHOTS: shots } = process.env;
const SECTIONS = ["Overview", "Workers", "Dead letters", "Audit", "Configuration"];
const HOSTILE = "<script>window.pwned=1</script>";

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const page = await browser.newPage({ viewport: { width: 1280, height: 860 }, colorScheme: "light" });
page.setDefaultTimeout(30_000);
const faults = [];
page.on("pageerror", (error) => faults.push(`a script failed: ${error.message}`));
page.on("dialog", (dialog) => { faults.push(`a script has opened a dialog: ${dialog.message()}`); dialog.dismiss(); });
page.on("console", (line) => { if (line.type() === "error" && !line.text().startsWith("Failed to load resource")) faults.push(`the browser complains: ${line.text()}`); });
page.on("request", (request) => { if (!request.url().startsWith(url) && !request.url().startsWith("data:")) faults.push(`a foreign place was asked: ${request.url()}`); });

let steps = 0;
async function step(name, act) {
  try {
    await act();
    steps += 1;
    console.log(`ok  ${name}`);
  } catch (error) {
    console.log(`NOT ${name}: ${error.message}\n${error.stack}`);
    await browser.close();
    process.exit(1);
  }
}
const main = page.locator("main");
const shot = async (name) => { if (shots) await page.screenshot({ path: `${shots}/${name}.png` }); };
const focused = () => page.evaluate(() => document.activeElement?.id ?? "");
const sees = (text, place = main) => place.getByText(text, { exact: false }).first().waitFor();

/** The contrast of a text with what is behind it, as WCAG 2 counts it. */
const contrast = (selector) => page.evaluate((selector) => {
  const numbers = (colour) => colour.match(/[\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255).map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4).reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
  const element = document.querySelector(selector);
  let behind = element;
  while (behind && (numbers(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
  const [a, b] = [luminance(numbers(getComputedStyle(element).color)), luminance(numbers(getComputedStyle(behind ?? document.body).backgroundColor))];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}, selector);

await step("the page opens and says how everything stands", async () => {
  await page.goto(`${url}/console`);
  await page.locator(".verdict h1").waitFor();
  assert.match(await page.locator(".verdict h1").innerText(), /^(OK|DEGRADED): /);
  await page.locator("table[aria-label=Pipelines] >> text=counters").first().waitFor();
  await page.waitForFunction(() => document.querySelectorAll(".charts .chart-line").length >= 3, undefined, { timeout: 60_000 });
});

await step("every section is a key away, and the title follows", async () => {
  for (const [n, name] of SECTIONS.entries()) {
    await page.keyboard.press(String(n + 1));
    await page.waitForFunction((name) => document.title.startsWith(name), name);
    assert.equal(await page.locator("nav a[aria-current=page]").count(), 1);
    assert.ok((await page.locator("nav a[aria-current=page]").innerText()).startsWith(name));
  }
  await page.keyboard.press("?");
  await page.locator("dialog >> text=Keyboard").waitFor();
  await page.keyboard.press("Escape");
  await page.locator("dialog").waitFor({ state: "detached" });
});

await step("daemons and what the members hold are listed", async () => {
  await page.keyboard.press("2");
  await page.locator("table[aria-label=Daemons] >> text=flowing").first().waitFor();
  await page.locator("table[aria-label='Members of the groups'] tbody tr").first().waitFor();
});

await step("markup of an entry is text and nothing else", async () => {
  await page.keyboard.press("3");
  await page.locator("table[aria-label='Dead letters'] tbody tr").first().waitFor();
  await page.keyboard.press("/");
  assert.equal(await focused(), "find-key");
  await page.keyboard.type(HOSTILE);
  await page.keyboard.press("Enter");
  await sees("1 letter");
  const link = page.locator("button.link.mono").first();
  await link.focus();
  const id = await focused();
  await page.keyboard.press("Enter");
  await sees(HOSTILE, page.locator("dialog"));
  await sees("<img src=x onerror=alert(1)>", page.locator("dialog"));
  await sees("\\u{202e}", page.locator("dialog"));
  assert.equal(await page.locator("dialog script, dialog img, main script, main img").count(), 0);
  await page.keyboard.press("Escape");
  await page.locator("dialog").waitFor({ state: "detached" });
  assert.equal(await focused(), id, "the focus is where it was");
  assert.equal(await page.evaluate(() => window.pwned), undefined);
});

await step("what a script would need is refused by the policy", async () => {
  const ran = await page.evaluate(() => {
    const script = document.createElement("script");
    try { script.textContent = "window.pwned = 1"; document.body.append(script); } catch { /* refused */ }
    try { document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.pwned=1'>"); } catch { /* refused */ }
    return window.pwned;
  });
  assert.equal(ran, undefined);
  faults.length = 0; // The browser has complained, as it should.
});

await step("without the token nothing can be changed, and a wrong one is refused", async () => {
  await page.locator("button[type=reset]").click();
  await page.locator("#redrive:disabled").waitFor();
  await page.keyboard.press("Escape");
  await page.locator("h1").first().click();
  await page.keyboard.press("t");
  await page.keyboard.type("wrong-token-0123456789");
  await page.keyboard.press("Enter");
  await sees("This is not the token.", page.locator("dialog"));
  await page.locator("dialog input[name=token]").fill(token);
  await page.locator("dialog input[name=operator]").fill("ada");
  await page.keyboard.press("Enter");
  await page.locator("dialog").waitFor({ state: "detached" });
  await page.locator("#token >> text=Changes allowed").waitFor();
  assert.deepEqual(await page.evaluate(() => [document.cookie, localStorage.length, sessionStorage.length]), ["", 0, 0]);
});

await step("letters are redriven by keyboard, after a trial has said what will happen", async () => {
  await page.locator("#find-key").fill("refused");
  await page.keyboard.press("Enter");
  await sees("3 letters");
  await page.locator("#redrive:enabled").focus();
  await page.keyboard.press("Enter");
  await sees("3 would be redriven", page.locator("dialog"));
  await page.locator("dialog button[type=submit]").focus();
  await page.keyboard.press("Enter");
  await page.locator("#toasts >> text=3 redriven").waitFor();
  await sees("No dead letter is open");
});

await step("a letter is marked, discarded with a reason, found among the discarded, and opened again", async () => {
  await page.locator("#find-key").fill(HOSTILE);
  await page.keyboard.press("Enter");
  await sees("1 letter");
  await page.locator("main input[type=checkbox]").first().focus();
  await page.keyboard.press("Space");
  await page.locator("#discard >> text=1 marked").focus();
  await page.keyboard.press("Enter");
  await page.locator("dialog input[name=because]").fill("a test");
  await page.keyboard.press("Enter");
  await page.locator("#toasts >> text=1 discarded").waitFor();
  await page.locator("#find-state").selectOption("discarded");
  await page.locator("#find-key").press("Enter");
  await sees("by ada (console): a test");
  await page.locator("#reopen").click();
  await page.locator("#toasts >> text=1 opened again").waitFor();
});

await step("a pipeline is paused and resumed", async () => {
  await page.locator("h1").first().click();
  await page.keyboard.press("1");
  await page.locator("#pause-counters:enabled").focus();
  await page.keyboard.press("Enter");
  await page.locator("dialog input[name=duration]").fill("30m");
  await page.locator("dialog input[name=reason]").fill(HOSTILE);
  await page.keyboard.press("Enter");
  await page.locator("#toasts >> text=counters: paused").waitFor();
  await page.locator("#pause-counters >> text=Resume").waitFor();
  await sees(HOSTILE, page.locator(".verdict"));
  await page.locator("#pause-counters").click();
  await page.locator("#pause-counters >> text=Pause").waitFor();
});

await step("the streams of a pipeline unfold", async () => {
  await page.locator("#streams-counters").click();
  await sees("flush:counters");
  assert.equal(await page.locator("#streams-counters").getAttribute("aria-expanded"), "true");
  await page.locator("#streams-counters").click();
});

await step("an audit is asked for, and its result and everything done is listed", async () => {
  await page.keyboard.press("4");
  await page.locator("#audit-pipeline").selectOption("counters");
  await page.locator("#audit-start:enabled").click();
  await sees("counters judged", main);
  for (const action of ["redrive", "discard", "reopen", "pause", "resume", "audit"]) await page.locator(`table[aria-label='Done in this console'] >> text=${action}`).first().waitFor();
});

await step("the configuration hides secrets and says where each value is written", async () => {
  await page.locator("h1").first().click();
  await page.keyboard.press("5");
  await page.keyboard.press("/");
  await page.keyboard.type("admin.token");
  const row = page.locator("table[aria-label=Configuration] tbody tr", { hasText: "admin.token" }).first();
  await row.locator("text=***").waitFor();
  await page.locator("#find-setting").fill("postgres.url");
  await page.locator("table[aria-label=Configuration] >> text=env DATABASE_URL").waitFor();
  assert.ok(!(await page.content()).includes(token), "the token is nowhere on the page");
});

await step("each section fits a narrow screen, in light and in dark, and its text can be read", async () => {
  for (const colorScheme of ["light", "dark"]) {
    await page.emulateMedia({ colorScheme });
    for (const width of [320, 390, 1280]) {
      await page.setViewportSize({ width, height: 800 });
      for (const name of ["overview", "workers", "letters", "audit", "settings"]) {
        await page.goto(`${url}/console#${name}`);
        await page.locator("main table, main .empty").first().waitFor();
        const [inner, scrolled] = await page.evaluate(() => [innerWidth, document.documentElement.scrollWidth]);
        assert.ok(scrolled <= inner, `${name} is ${scrolled} wide on a screen of ${inner}`);
      }
    }
    await page.goto(`${url}/console#overview`);
    await page.locator(".pill.good").first().waitFor();
    for (const selector of ["h1", "main .muted", "th", "nav a[aria-current]", ".pill.good", "#token", "figcaption", "td a, td button.link"]) {
      const found = await contrast(selector);
      assert.ok(found >= 4.5, `${colorScheme}: ${selector} has a contrast of ${found.toFixed(2)}`);
    }
  }
});

await step("an empty list, a slow answer and a daemon that is away are told as such", async () => {
  await page.goto(`${url}/console#letters`);
  await page.reload();
  await page.locator("main tbody tr").first().waitFor();
  await page.locator("#find-key").fill("nobody");
  await page.locator("#find-key").press("Enter");
  await sees("No dead letter is open");
  await page.route("**/api/status", (route) => route.fulfill({ status: 504, contentType: "application/json", body: JSON.stringify({ error: `PostgreSQL is slow ${HOSTILE}` }) }));
  await page.locator("#notice", { hasText: `PostgreSQL is slow ${HOSTILE}` }).waitFor();
  await page.unroute("**/api/status");
  await page.locator("#notice").waitFor({ state: "hidden" });
  await page.route("**/api/**", (route) => route.abort());
  await page.locator("#notice", { hasText: "cannot be reached" }).waitFor();
  assert.ok(await page.locator("main.stale").count(), "what is shown is marked as old");
  await page.unroute("**/api/**");
  await page.locator("#notice").waitFor({ state: "hidden" });
  await page.route("**/api/config**", async (route) => { await new Promise((done) => setTimeout(done, 300)); await route.continue(); });
  await page.goto(`${url}/console#settings`);
  await page.reload({ waitUntil: "commit" });
  await sees("Loading");
  await sees("keys");
  await page.unroute("**/api/config**");
});

if (shots) {
  for (const [name, colorScheme, width, height, section] of [["console", "light", 1280, 900, "overview"], ["console-dark", "dark", 1280, 900, "letters"], ["console-narrow", "dark", 390, 844, "overview"]]) {
    await page.emulateMedia({ colorScheme });
    await page.setViewportSize({ width, height });
    await page.goto(`${url}/console#${section}`);
    await page.reload();
    await page.locator(section === "overview" ? ".chart-line" : "main tbody tr").first().waitFor();
    await page.waitForTimeout(2500);
    await shot(name);
  }
}

await browser.close();
if (faults.length) {
  console.log(`NOT quiet:\n${faults.join("\n")}`);
  process.exit(1);
}
console.log(`${steps} steps, and the browser had nothing to complain about`);
