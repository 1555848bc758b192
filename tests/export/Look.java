import ij.ImagePlus;
import ij.gui.Roi;
import ij.io.Opener;
import ij.io.RoiDecoder;
import ij.measure.Calibration;
import ij.process.ImageStatistics;
import java.io.ByteArrayOutputStream;
import java.io.FileInputStream;
import java.util.zip.ZipEntry;
import java.util.zip.ZipInputStream;

/** What ImageJ makes of our files: a line for every label image, and for every region of a zip on the image before it. */
public class Look {
  public static void main(String[] paths) throws Exception {
    ImagePlus image = null;
    for (String path : paths) {
      if (path.endsWith(".zip")) {
        look(image, path);
        continue;
      }
      image = new Opener().openImage(path);
      if (image == null) {
        System.out.println("not opened");
        continue;
      }
      double max = 0;
      for (int i = 1; i <= image.getStackSize(); i++) {
        max = Math.max(max, image.getStack().getProcessor(i).getStatistics().max);
      }
      Calibration scale = image.getCalibration();
      System.out.printf(
          "image %d %d %d %d %.6f %s %.0f%n", image.getNFrames(), image.getNSlices(), image.getHeight(),
          image.getWidth(), scale.pixelWidth, scale.pixelWidth != 1 ? scale.getUnit() : "pixel", max);
    }
  }

  private static void look(ImagePlus image, String path) throws Exception {
    ZipInputStream zip = new ZipInputStream(new FileInputStream(path));
    for (ZipEntry entry = zip.getNextEntry(); entry != null; entry = zip.getNextEntry()) {
      ByteArrayOutputStream bytes = new ByteArrayOutputStream();
      zip.transferTo(bytes);
      Roi roi = new RoiDecoder(bytes.toByteArray(), entry.getName()).getRoi();
      if (roi.hasHyperStackPosition()) {
        image.setPosition(roi.getCPosition(), roi.getZPosition(), roi.getTPosition());
      } else if (roi.getPosition() > 0) {
        image.setSlice(roi.getPosition());
      }
      image.setRoi(roi);
      ImageStatistics figures = image.getStatistics();
      System.out.printf(
          "region %s %d %d %.3f %s%n", roi.getName(), image.getCurrentSlice(), figures.pixelCount, figures.mean,
          Integer.toHexString(roi.getStrokeColor().getRGB()));
    }
  }
}
