// Inspects the open page: its elements, and everything that makes it hard to read.
(() => {
  const shown = (element) => element.checkVisibility({ opacityProperty: false, visibilityProperty: true });
  const named = (element) => `${element.tagName} ${(element.textContent || "").trim().slice(0, 40)}`;
  const root = document.documentElement;
  const parsed = (color) => (color.match(/[\d.]+/g) || []).map(Number);
  const luminance = (color) => {
    const [r, g, b] = parsed(color).map((part) => part / 255).map((part) => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (parsed(color)[3] !== 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const contrast = (element) => {
    const style = getComputedStyle(element);
    const ink = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const [dark, light] = [luminance(ink), luminance(ground(element))].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };
  for (const folded of document.querySelectorAll("details")) folded.open = true;
  const all = [...document.body.querySelectorAll("*")].filter(shown);
  const worded = all.filter((element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
  const svgs = all.filter((element) => element.tagName === "svg");
  const texts = (svg) => [...svg.querySelectorAll("text")].filter((text) => text.getAttribute("opacity") !== "0" && text.textContent);
  const apart = (a, b) => a.right <= b.left + 0.5 || b.right <= a.left + 0.5 || a.bottom <= b.top + 2.5 || b.bottom <= a.top + 2.5;
  const outside = (inner, outer) => inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1;
  return {
    width: root.scrollWidth,
    dark: luminance(getComputedStyle(document.body).color) > 0.5,
    lang: root.lang,
    overflowing: all
      .filter((element) => !element.closest("svg, .hidden"))
      .filter((element) => element.getBoundingClientRect().right > innerWidth + 0.5 || (element.scrollWidth > innerWidth))
      .map(named),
    clipped: all
      .filter((element) => !element.closest("svg, .hidden") && getComputedStyle(element).overflowX !== "visible")
      .filter((element) => element.scrollWidth > element.clientWidth + 1 || element.scrollHeight > element.clientHeight + 1)
      .map(named),
    split: [...document.querySelectorAll("thead th bdi")]
      .filter((head) => shown(head) && !/\s/.test(head.textContent) && head.textContent.length < 10 && head.getClientRects().length > 1)
      .map(named),
    faint: worded.filter((element) => !element.closest(".hidden") && contrast(element) < 4.5).map((element) => `${named(element)} ${contrast(element)}`),
    pictures: svgs.map((svg) => ({
      name: svg.getAttribute("aria-label"),
      marks: svg.querySelectorAll("path[fill^='var(--ink'], path[stroke^='var(--ink']").length,
      texts: texts(svg).length,
    })),
    smallest: Math.min(...svgs.flatMap((svg) => texts(svg).map((text) => parseFloat(getComputedStyle(text).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width))),
    outside: svgs.flatMap((svg) => texts(svg).filter((text) => outside(text.getBoundingClientRect(), svg.getBoundingClientRect())).map((text) => `${named(text)} in ${svg.getAttribute("aria-label")}`)),
    overlapping: svgs.flatMap((svg) => {
      const boxes = texts(svg).map((text) => [text, text.getBoundingClientRect()]);
      return boxes.flatMap(([a, box], place) => boxes.slice(place + 1).filter(([, other]) => !apart(box, other)).map(([b]) => `${named(a)} | ${named(b)}`));
    }),
    headings: [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].map((heading) => Number(heading.tagName[1])),
    nameless: [
      ...[...document.querySelectorAll("table")].filter((table) => !table.caption || !table.caption.textContent.trim()),
      ...[...document.querySelectorAll("th")].filter((head) => !head.scope),
      ...[...document.querySelectorAll("svg")].filter((svg) => !svg.getAttribute("aria-label")),
      ...[...document.querySelectorAll("figure")].filter((figure) => !figure.querySelector(":scope > figcaption")),
      ...[...document.querySelectorAll("[aria-labelledby]")].filter((part) => !document.getElementById(part.getAttribute("aria-labelledby"))),
      ...[...document.querySelectorAll("h1, h2, h3")].filter((heading) => !heading.textContent.trim()),
    ].map(named),
    ids: [...document.querySelectorAll("[id]")].map((element) => element.id).sort(),
  };
})()
