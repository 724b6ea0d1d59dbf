# Reads "first-row last-row" and "name value" lines; writes rows of grey values, 0 inside the set.
$1 == "rows" { first = $2; last = $3 }
$1 != "rows" { set[$1] = $2 }
END {
    for (row = first; row <= last; row++) {
        ci = set["top"] - row * (set["top"] - set["bottom"]) / (set["height"] - 1)
        line = ""
        for (column = 0; column < set["width"]; column++) {
            cr = set["left"] + column * (set["right"] - set["left"]) / (set["width"] - 1)
            zr = zi = n = 0
            while (zr * zr + zi * zi <= 4 && n < set["limit"]) {
                t = zr * zr - zi * zi + cr
                zi = 2 * zr * zi + ci
                zr = t
                n++
            }
            line = line (n == set["limit"] ? 0 : 255 - (n > 254 ? 254 : n)) " "
        }
        print line
    }
}
