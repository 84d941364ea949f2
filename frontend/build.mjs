// Bundles the explorer into the package: one ES module and one stylesheet, nothing fetched at run time.
import * as esbuild from "esbuild";

const options = {
  entryPoints: { explorer: "src/main.ts" },
  bundle: true,
  format: "esm",
  target: "es2022",
  minify: true,
  legalComments: "inline",
  outdir: "../adkit/viz/assets",
  jsx: "automatic",
  jsxImportSource: "preact",
  logLevel: "info",
};

if (process.argv.includes("--watch")) await (await esbuild.context(options)).watch();
else await esbuild.build(options);
