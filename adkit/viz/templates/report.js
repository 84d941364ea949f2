(function () {
  "use strict";
  var sections = Array.prototype.slice.call(document.querySelectorAll("main section"));
  var links = Array.prototype.slice.call(document.querySelectorAll("nav a"));
  var box = document.querySelector("nav input");
  var current = 0;
  var words = sections.map(function (s) { return s.textContent.toLowerCase(); });

  function shown() { return sections.filter(function (s) { return !s.classList.contains("hide"); }); }
  function mark(section) {
    current = sections.indexOf(section);
    links.forEach(function (a) {
      var on = a.getAttribute("href") === "#" + section.id;
      a.classList.toggle("on", on);
      if (on && a.scrollIntoView) { a.scrollIntoView({ block: "nearest" }); }
    });
  }
  function go(delta) {
    var list = shown();
    var at = list.indexOf(sections[current]);
    var next = list[Math.max(0, Math.min(list.length - 1, at + delta))];
    if (!next) { return; }
    mark(next);
    history.replaceState(null, "", "#" + next.id);
    next.scrollIntoView({ block: "start" });
  }
  box.addEventListener("input", function () {
    var want = box.value.trim().toLowerCase();
    sections.forEach(function (s, i) {
      var hide = want !== "" && words[i].indexOf(want) < 0;
      s.classList.toggle("hide", hide);
      links.forEach(function (a) {
        if (a.getAttribute("href") === "#" + s.id) { a.classList.toggle("hide", hide); }
      });
    });
  });
  document.addEventListener("keydown", function (e) {
    if (e.target === box) { if (e.key === "Escape") { box.value = ""; box.dispatchEvent(new Event("input")); box.blur(); } return; }
    if (e.altKey || e.ctrlKey || e.metaKey) { return; }
    if (e.key === "ArrowRight") { go(1); e.preventDefault(); }
    if (e.key === "ArrowLeft") { go(-1); e.preventDefault(); }
    if (e.key === "/") { box.focus(); e.preventDefault(); }
  });
  links.forEach(function (a) {
    a.addEventListener("click", function () {
      var s = document.getElementById(a.getAttribute("href").slice(1));
      if (s) { mark(s); }
    });
  });
  var waiting = false;
  document.addEventListener("scroll", function () {
    if (waiting) { return; }
    waiting = true;
    requestAnimationFrame(function () {
      waiting = false;
      var list = shown().filter(function (s) { return s.getBoundingClientRect().top < 120; });
      if (list.length) { mark(list[list.length - 1]); }
    });
  });
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (d) { d.open = true; });
  });
  if (sections.length) { mark(document.getElementById(location.hash.slice(1)) || sections[0]); }
})();
