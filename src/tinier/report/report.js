// Draws the chart from the specification in the page. Expressions are interpreted (ast), so that no code is made from text.
(function () {
  const specification = JSON.parse(document.getElementById("specification").textContent);
  vegaEmbed("#chart", specification, {
    mode: "vega-lite",
    renderer: "svg",
    ast: true,
    actions: false,
    defaultStyle: false,
    tooltip: { disableDefaultStyle: true },
  }).then(
    () => document.getElementById("chart").setAttribute("data-drawn", "yes"),
    (error) => {
      document.getElementById("chart").textContent = "The chart could not be drawn: " + error.message;
      console.error(error);
    },
  );
})();
